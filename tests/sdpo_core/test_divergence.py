"""Divergences against a slow float64 formula on plain Python numbers, and their properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Outside, Support

ALPHAS = (0.0, 0.25, 0.5, 0.9, 1.0)
VOCAB = 9
QUICK = settings(max_examples=25, deadline=None)


def draw(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def spec(alpha: float, support: Support = "full", k: int | None = 4, outside: Outside = "tail") -> DivergenceSpec:
    return DivergenceSpec(alpha, support, k, outside)


def loss(student: Tensor, teacher: Tensor, s: DivergenceSpec, ids: Tensor | None = None) -> Tensor:
    """Per-token divergence of logits (T, V)."""
    tokens = torch.zeros(student.shape[:-1], dtype=torch.long) if ids is None else ids
    return dv.token_divergence(dv.scores(student), dv.teacher_target(teacher, tokens, s), tokens, s)


def slow_softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow(student: list[float], teacher: list[float], s: DivergenceSpec) -> float:
    """One position, by the definitions."""
    p, q = slow_softmax(student), slow_softmax(teacher)
    if s.support != "full":
        order = q if s.support == "teacher" else p
        kept = sorted(range(len(p)), key=lambda i: -order[i])[: s.top_k]
        inside = [(p[i], q[i]) for i in kept]
        p, q = [a for a, _ in inside], [b for _, b in inside]
        if s.outside == "tail":
            p, q = [*p, max(1 - sum(p), 1e-7)], [*q, max(1 - sum(q), 1e-7)]
        else:
            p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    if s.alpha == 0:
        return slow_kl(q, p)
    if s.alpha == 1:
        return slow_kl(p, q)
    m = [(1 - s.alpha) * a + s.alpha * b for a, b in zip(p, q, strict=True)]
    return (1 - s.alpha) * slow_kl(p, m) + s.alpha * slow_kl(q, m)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("support", "outside"),
    [("full", "tail"), *itertools.product(("teacher", "student"), ("tail", "renormalise"))],
)
def test_equals_the_definition(alpha: float, support: Support, outside: Outside) -> None:
    student, teacher = draw(1, 6, VOCAB), draw(2, 6, VOCAB)
    s = spec(alpha, support, 4, outside)
    want = [slow(a, b, s) for a, b in zip(student.double().tolist(), teacher.double().tolist(), strict=True)]
    torch.testing.assert_close(loss(student, teacher, s), torch.tensor(want), atol=2e-6, rtol=2e-5)


def test_alpha_weights_the_teacher() -> None:
    """A swap is invisible at .5; at .25 and .9 the mixture is made by hand."""
    student, teacher = draw(1, VOCAB), draw(2, VOCAB)
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    for alpha in (0.25, 0.9):
        m = (1 - alpha) * p + alpha * q
        want = (1 - alpha) * (p * (p / m).log()).sum() + alpha * (q * (q / m).log()).sum()
        torch.testing.assert_close(loss(student, teacher, spec(alpha)), want)


@QUICK
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from(ALPHAS), k=st.integers(1, VOCAB))
def test_identical_distributions_are_at_distance_zero(seed: int, alpha: float, k: int) -> None:
    logits = draw(seed, 3, VOCAB)
    for support, outside in itertools.product(("full", "teacher", "student"), ("tail", "renormalise")):
        s = spec(alpha, support, k, outside)  # type: ignore[arg-type]
        assert loss(logits, logits + 3.0, s).abs().max() < 2e-6
    ids = torch.randint(0, VOCAB, (3,), generator=torch.Generator().manual_seed(seed))
    assert loss(logits, logits, spec(1.0, "sampled", None), ids).abs().max() == 0


@QUICK
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 0.99))
def test_mixture_is_bounded_and_symmetric_under_swap(seed: int, alpha: float) -> None:
    student, teacher = draw(seed, 4, VOCAB, scale=6.0), draw(seed + 1, 4, VOCAB, scale=6.0)
    value = loss(student, teacher, spec(alpha))
    bound = -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
    assert value.min() >= -1e-6
    assert value.max() <= bound + 1e-6
    torch.testing.assert_close(value, loss(teacher, student, spec(1 - alpha)), atol=2e-6, rtol=1e-5)


def test_ends_are_kl_and_the_mixture_tends_to_their_scaled_value() -> None:
    student, teacher = draw(3, VOCAB).double(), draw(4, VOCAB).double()
    forward, reverse = loss(student, teacher, spec(0.0)), loss(student, teacher, spec(1.0))
    small = 1e-3
    assert loss(student, teacher, spec(small)) / small == pytest.approx(float(forward), rel=0.02)
    assert loss(student, teacher, spec(1 - small)) / small == pytest.approx(float(reverse), rel=0.05)
    assert dv.mixture_divergence(dv.log_probs(student), dv.log_probs(teacher), 0.0) == 0
    assert dv.mixture_divergence(dv.log_probs(student), dv.log_probs(teacher), 1.0) == 0


@QUICK
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from(ALPHAS))
def test_full_divergence_grows_with_disagreement(seed: int, alpha: float) -> None:
    student, direction = draw(seed, VOCAB), draw(seed + 1, VOCAB)
    values = [float(loss(student, student + x * direction, spec(alpha))) for x in (0.0, 0.3, 0.7, 1.5, 3.0)]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(values))


@QUICK
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from(ALPHAS), support=st.sampled_from(("teacher", "student")))
def test_top_k_with_tail_approaches_full_from_below(seed: int, alpha: float, support: Support) -> None:
    student, teacher = draw(seed, VOCAB), draw(seed + 1, VOCAB)
    full = float(loss(student, teacher, spec(alpha)))
    values = [float(loss(student, teacher, spec(alpha, support, k))) for k in range(1, VOCAB + 1)]
    assert all(b >= a - 1e-5 for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(full, abs=1e-5)
    beyond = float(loss(student, teacher, spec(alpha, support, VOCAB + 50)))
    assert beyond == values[-1]
    assert float(loss(student, teacher, spec(alpha, support, VOCAB, "renormalise"))) == pytest.approx(full, abs=1e-5)
    assert float(loss(student, teacher, spec(alpha, support, 1, "renormalise"))) == pytest.approx(0, abs=1e-7)


@QUICK
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from(ALPHAS), support=st.sampled_from(("full", "teacher")))
def test_shifting_logits_changes_nothing_and_gradient_rows_sum_to_zero(
    seed: int, alpha: float, support: Support
) -> None:
    student = draw(seed, 3, VOCAB).requires_grad_()
    teacher = draw(seed + 1, 3, VOCAB)
    shifted = loss(student + draw(seed + 2, 3, 1), teacher + draw(seed + 3, 3, 1), spec(alpha, support))
    torch.testing.assert_close(loss(student, teacher, spec(alpha, support)), shifted, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(shifted.sum(), student)
    rounding = 2e-6 * (1 + gradient.abs().sum(-1))
    assert bool((gradient.sum(-1).abs() < rounding).all())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", ["full", "teacher", "student"])
def test_finite_on_extremes(alpha: float, support: Support) -> None:
    """One-hot teachers, forbidden tokens, students at -150 and logits of +-1e4."""
    one_hot = torch.full((VOCAB,), -60.0).index_fill(0, torch.tensor([2]), 60.0)
    forbidden = draw(1, VOCAB).index_fill(0, torch.tensor([0, 3]), -math.inf)
    peaked = torch.full((VOCAB,), -150.0).index_fill(0, torch.tensor([5]), 0.0)
    huge = torch.tensor([1e4, -1e4] * VOCAB)[:VOCAB]
    rows = [one_hot, forbidden, peaked, huge, draw(2, VOCAB)]
    for a, b in itertools.product(rows, rows):
        student = a.clone().unsqueeze(0).requires_grad_()
        value = loss(student, b.unsqueeze(0), spec(alpha, support))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert bool(torch.isfinite(value).all())
        assert bool(torch.isfinite(gradient).all())


def test_tail_of_a_peaked_student_is_not_rounding_noise() -> None:
    """Mass 1e-6 outside the kept tokens: the complement of a float32 sum would be off by percents."""
    logits = torch.tensor([20.0, 3.0, 5.5, 5.0, 4.0, 3.5])
    index = logits.topk(1).indices
    exact = torch.softmax(logits.double(), -1)[1:].sum().log()
    got = dv.log_tail_outside(dv.log_probs(logits), index)
    assert float(exact) > dv.TAIL_FLOOR
    assert float(got) == pytest.approx(float(exact), abs=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", ["full", "teacher"])
def test_gradient_against_finite_differences(alpha: float, support: Support) -> None:
    student, teacher = draw(5, 2, VOCAB), draw(6, 2, VOCAB)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, teacher, spec(alpha, support)).sum(), leaf)
    h = 1e-5
    for row, column in itertools.product(range(2), range(VOCAB)):
        values = []
        for sign in (1, -1):
            moved = student.double()
            moved[row, column] += sign * h
            s = spec(alpha, support)
            values.append(slow(moved[row].tolist(), teacher.double()[row].tolist(), s))
        assert float(gradient[row, column]) == pytest.approx((values[0] - values[1]) / (2 * h), abs=2e-5)


def test_sampled_gradient_is_the_reverse_kl_gradient_in_expectation() -> None:
    """Exact sum over the vocabulary instead of sampling; the value is no divergence."""
    student, teacher = draw(7, 1, VOCAB), draw(8, 1, VOCAB)
    weights = torch.softmax(student[0], -1)
    total = torch.zeros(VOCAB)
    for y in range(VOCAB):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, spec(1.0, "sampled", None), torch.tensor([y]))
        total += weights[y] * torch.autograd.grad(value.sum(), leaf)[0][0]
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, teacher, spec(1.0)).sum(), leaf)
    torch.testing.assert_close(total, want[0], atol=1e-6, rtol=1e-5)


def test_sampled_floor_outside_the_teachers_top_k() -> None:
    teacher = torch.arange(VOCAB, dtype=torch.float32).unsqueeze(0)
    s = DivergenceSpec(1.0, "sampled", 3, sampled_floor=-20.0)
    inside = dv.teacher_target(teacher, torch.tensor([VOCAB - 1]), s)
    outside = dv.teacher_target(teacher, torch.tensor([0]), s)
    assert float(inside.logp) == pytest.approx(float(torch.log_softmax(teacher, -1)[0, -1]))
    assert float(outside.logp) == -20.0


def test_low_precision_logits_are_scored_in_float32() -> None:
    student, teacher = draw(1, 4, VOCAB).bfloat16(), draw(2, 4, VOCAB).bfloat16()
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, spec(0.5))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), spec(0.5)))
