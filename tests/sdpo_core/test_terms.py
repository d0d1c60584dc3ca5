"""Weights, masks and gradient flow of the per-token loss, and its aggregation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core.aggregation import Aggregation, aggregate, row_weights
from sdpo_core.divergence import DivergenceSpec, Target, teacher_target, token_log_probs
from sdpo_core.terms import TokenTerms, token_terms
from sdpo_core.weights import importance_ratio, k3, rollout_weights, top_entropy_mask

B, T, V = 3, 5, 8
QUICK = settings(max_examples=20, deadline=None)
SPECS = (
    DivergenceSpec(0.0, "teacher", 3),
    DivergenceSpec(0.5, "student", 3, "renormalise"),
    DivergenceSpec(1.0, "full"),
    DivergenceSpec(1.0, "sampled"),
)
MODES: tuple[Aggregation, ...] = (
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "row-mean-token-mean",
)  # fmt: skip


class Case:
    """Seeded inputs of one micro-batch."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.student = torch.randn(B, T, V, generator=g) * 2
        self.teacher = torch.randn(B, T, V, generator=g) * 2
        self.ids = torch.randint(0, V, (B, T), generator=g)
        self.mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
        self.own = token_log_probs(torch.log_softmax(self.student, -1), self.ids)
        self.old = self.own + torch.randn(B, T, generator=g) * 0.5

    def terms(self, spec: DivergenceSpec, clip: float | None = 2.0, **changes: Tensor | None) -> TokenTerms:
        student = changes.pop("student", self.student)
        assert student is not None
        target = teacher_target(self.teacher, self.ids, spec)
        values = {"behaviour_BT": self.old, **changes}
        return token_terms(student, target, self.ids, self.mask, spec, is_clip=clip, **values)


@pytest.mark.parametrize("spec", SPECS)
def test_masked_positions_are_exactly_dead_even_if_they_hold_nan(spec: DivergenceSpec) -> None:
    case = Case()
    off = case.mask == 0
    student = case.student.clone()
    student[off] = math.nan
    case.teacher = case.teacher.masked_fill(off.unsqueeze(-1), math.inf)
    leaf = student.requires_grad_()
    poison = case.old.masked_fill(off, math.nan)
    terms = case.terms(spec, student=leaf, behaviour_BT=poison, base_logp_BT=poison)
    (terms.distill + terms.anchor).sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[off] == 0).all())
    assert bool(torch.isfinite(leaf.grad).all())
    assert bool((leaf.grad[~off].abs().sum(-1) > 0).any())
    clean = Case().terms(spec, base_logp_BT=Case().old)
    torch.testing.assert_close(terms.distill.detach(), clean.distill)


@pytest.mark.parametrize("spec", SPECS)
def test_only_the_student_receives_gradient(spec: DivergenceSpec) -> None:
    case = Case()
    fixed = [t.requires_grad_() for t in (case.teacher, case.old, case.old.detach().clone())]
    leaf = case.student.clone().requires_grad_()
    terms = case.terms(spec, student=leaf, base_logp_BT=fixed[2], token_weights_BT=fixed[1].exp())
    (terms.distill + terms.anchor).sum().backward()
    assert leaf.grad is not None
    assert all(t.grad is None for t in fixed)
    assert not terms.gap.requires_grad
    assert not terms.ratio.requires_grad


def test_behaviour_equal_to_the_student_gives_ratio_one_and_no_change() -> None:
    case = Case()
    for spec in SPECS:
        with_ratio = case.terms(spec, behaviour_BT=case.own)
        assert bool((with_ratio.ratio[case.mask == 1] == 1).all())
        torch.testing.assert_close(with_ratio.distill, case.terms(spec, clip=None).distill, atol=0, rtol=0)
        unknown = case.terms(spec, behaviour_BT=torch.full_like(case.old, math.nan))
        torch.testing.assert_close(unknown.distill, with_ratio.distill, atol=0, rtol=0)


@pytest.mark.parametrize(("shift", "scale"), [(0.4, math.exp(0.4)), (3.0, 2.0), (-9.0, math.exp(-9.0))])
def test_uniform_ratio_scales_loss_and_gradient(shift: float, scale: float) -> None:
    """Below the clip by itself, above it by the clip; small ratios are not cut. The ratio carries no gradient."""
    case = Case()
    for spec in SPECS:
        gradients = []
        for clip, old in ((2.0, case.own - shift), (None, case.own)):
            leaf = case.student.clone().requires_grad_()
            case.terms(spec, clip, student=leaf, behaviour_BT=old).distill.sum().backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], scale * gradients[1], rtol=1e-4, atol=1e-7)


@QUICK
@given(seed=st.integers(0, 1000))
def test_expected_ratio_is_one(seed: int) -> None:
    """Exact sum over y ~ behaviour, so a divergence weighted by the ratio is unbiased for the unweighted one."""
    g = torch.Generator().manual_seed(seed)
    student, behaviour = (torch.log_softmax(torch.randn(V, generator=g), -1) for _ in range(2))
    ratio = importance_ratio(student, behaviour, clip=1e9)
    assert float((behaviour.exp() * ratio).sum()) == pytest.approx(1.0, abs=1e-5)


def test_ratio_bounds() -> None:
    far = torch.tensor([0.0, -500.0])
    assert importance_ratio(far, torch.tensor([-500.0, 0.0]), 1e12).tolist() == pytest.approx(
        [math.exp(20), math.exp(-20)]
    )
    assert importance_ratio(far, torch.tensor([-500.0, 0.0]), 1.0).max() == 1
    assert importance_ratio(far, torch.tensor([-500.0, 0.0]), None).tolist() == [1, 1]


def test_k3() -> None:
    anchor = torch.tensor([-1.0, -1.0, -1.0, -100.0])
    student = torch.tensor([-1.0, -2.0, -0.5, -1.0], requires_grad=True)
    value = k3(student, anchor)
    value.sum().backward()
    assert value.tolist()[:3] == pytest.approx([0.0, math.exp(-1), math.exp(0.5) - 1.5])
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([0.0, math.exp(-1) - 1, math.exp(0.5) - 1, 0.0])


def test_rollout_weights_by_hand() -> None:
    log_ratio = torch.tensor([[0.5, 0.5, math.nan], [-1.0, 2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    token = rollout_weights(log_ratio, mask)
    assert token.tolist() == [pytest.approx([math.exp(0.5), math.exp(0.5), 0]), pytest.approx([math.exp(-1), 2, 1])]
    row = rollout_weights(log_ratio, mask, level="sequence", threshold=10.0)
    assert row.tolist() == [pytest.approx([math.e, math.e, 0]), pytest.approx([math.e] * 3)]
    normal = rollout_weights(log_ratio, mask, batch_normalise=True)
    assert float(normal.sum()) == pytest.approx(5.0)


def test_top_entropy_mask_ignores_padding() -> None:
    entropies = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert top_entropy_mask(entropies, mask, 0.5).tolist() == [[0, 0, 0], [1, 1, 0]]
    assert top_entropy_mask(entropies, mask * 0, 0.5).sum() == 0


def test_aggregation_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, math.nan], [4.0, math.nan, math.nan, math.nan], [math.nan] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    want = {
        "token-mean": 10 / 4,
        "seq-mean-token-sum": (6 + 4) / 2,
        "seq-mean-token-mean": (2 + 4) / 2,
        "seq-mean-token-sum-norm": 10 / 4,
        "row-mean-token-mean": (2 + 4 + 0) / 3,
    }
    for mode in MODES:
        assert float(aggregate(values, mask, mode)) == pytest.approx(want[mode]), mode


@pytest.mark.parametrize("mode", MODES)
def test_dead_batch_gives_a_zero_that_can_be_differentiated(mode: Aggregation) -> None:
    values = torch.full((2, 3), math.nan, requires_grad=True)
    total = aggregate(values, torch.zeros(2, 3), mode)
    total.backward()
    assert float(total.detach()) == 0
    assert values.grad is not None
    assert values.grad.abs().sum() == 0


@QUICK
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), mode=st.sampled_from(MODES), cut=st.integers(0, 6))
def test_row_weights_make_micro_batches_exact(lengths: list[int], mode: Aggregation, cut: int) -> None:
    """Summing parts with the batch's weights is the batch; padding and the order of rows change nothing."""
    longest = max(*lengths, 1)
    g = torch.Generator().manual_seed(sum(lengths))
    values = torch.randn(len(lengths), longest, generator=g).double()
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    whole = float(aggregate(values, mask, mode))
    weights = torch.tensor(row_weights(lengths, mode), dtype=torch.float64)
    rows = (values * mask).sum(-1)
    parts = float((rows[:cut] * weights[:cut]).sum()) + float((rows[cut:] * weights[cut:]).sum())
    assert parts == pytest.approx(whole, abs=1e-6)
    order = torch.randperm(len(lengths), generator=g)
    assert float(aggregate(values[order], mask[order], mode)) == pytest.approx(whole, abs=1e-6)
    padded = torch.nn.functional.pad(values, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    if mode != "seq-mean-token-sum-norm":
        assert float(aggregate(*padded, mode)) == pytest.approx(whole, abs=1e-6)


def test_sample_mean_keeps_every_sample_equal_whatever_its_length() -> None:
    """CLaaS's mean: repeating the batch leaves the loss; lengthening one row leaves the others' weight."""
    assert row_weights([2, 4], "seq-mean-token-mean") == [1 / 4, 1 / 8]
    assert row_weights([2, 4, 2, 4], "seq-mean-token-mean") == [1 / 8, 1 / 16, 1 / 8, 1 / 16]
    assert row_weights([2, 40], "seq-mean-token-mean")[0] == 1 / 4


@pytest.mark.parametrize(
    "spec",
    [
        *SPECS, DivergenceSpec(0.1, "teacher", 100), DivergenceSpec(0.5, "teacher", 100, "renormalise"),
        DivergenceSpec(0.0, "teacher", 100), DivergenceSpec(0.0, "teacher", 1), DivergenceSpec(1.0, "sampled", 5),
    ],
)  # fmt: skip
def test_the_gap_is_the_same_measure_whatever_is_trained(spec: DivergenceSpec) -> None:
    """A slow formula: forward KL on the teacher's 100 most probable of 120 tokens and one bucket for the others."""
    g = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(2, 3, 120, generator=g) * 3 for _ in range(2))
    ids, mask = torch.randint(0, 120, (2, 3), generator=g), torch.tensor([[1, 1, 1], [1, 1, 0]])
    terms = token_terms(student, teacher_target(teacher, ids, spec), ids, mask, spec, is_clip=2.0)
    for b, t in mask.nonzero().tolist():
        p, q = (torch.softmax(x[b, t].double(), -1).tolist() for x in (teacher, student))
        order = sorted(range(120), key=lambda v: -p[v])
        buckets = [*([v] for v in order[:100]), order[100:]]
        masses = [(sum(p[v] for v in bucket), sum(q[v] for v in bucket)) for bucket in buckets]
        assert float(terms.gap[b, t]) == pytest.approx(sum(x * math.log(x / y) for x, y in masses), rel=1e-4)
    assert float(terms.gap[1, 2]) == 0.0


def test_a_target_made_by_hand_may_not_know_the_gap() -> None:
    """Then it is unknown, not 0: 0 would be a closed one."""
    case, spec = Case(), DivergenceSpec(1.0, "sampled")
    terms = token_terms(case.student, Target(case.own), case.ids, case.mask, spec, is_clip=2.0)
    assert bool(terms.gap[case.mask == 1].isnan().all())
    assert bool((terms.gap[case.mask == 0] == 0).all())


def test_missing_parts_of_a_target_are_named() -> None:
    case = Case()
    spec = DivergenceSpec(0.5, "teacher", 3)
    whole = Target(torch.log_softmax(case.teacher, -1))
    with pytest.raises(ValueError, match="top-K indices"):
        token_terms(case.student, whole, case.ids, case.mask, spec, is_clip=None)


def test_weights_carry_no_gradient_whatever_they_are_given() -> None:
    """Each function by itself: callers that forget to detach must not turn a weight into a loss."""
    logp, old = (torch.full((1, 3), x, requires_grad=True) for x in (-1.0, -1.5))
    assert not importance_ratio(logp, old, 2.0).requires_grad
    assert not rollout_weights(logp - old, torch.ones(1, 3)).requires_grad
    target = teacher_target(torch.zeros(1, 3, V, requires_grad=True), torch.zeros(1, 3, dtype=torch.long), SPECS[0])
    assert not target.logp.requires_grad
