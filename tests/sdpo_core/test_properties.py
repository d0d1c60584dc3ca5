"""The list of properties that the algorithm must have, each with the test that holds it (the last tests of this file
check that the table is complete and that every test named in it exists), and the tests that had no other home.

 1  same distributions, zero loss             test_divergence.test_identical_distributions_are_at_distance_zero
 2  mixture within [0, h(alpha)]              test_divergence.test_mixture_is_bounded_and_symmetric_under_swap
 3  swap symmetry at 1 - alpha                test_divergence.test_mixture_is_bounded_and_symmetric_under_swap
 4  scaled limits, and the jump at the ends   test_divergence.test_ends_are_kl_and_the_mixture_tends_to_their_scaled_value
 5  grows with disagreement                   test_divergence.test_full_divergence_grows_with_disagreement
 6  top-K with tail rises to full             test_divergence.test_top_k_with_tail_approaches_full_from_below
 7  shifts change nothing, rows sum to 0      test_divergence.test_shifting_logits_changes_nothing_and_gradient_rows_sum_to_zero
 8  k beyond V; ties broken alike             test_properties.test_ties_are_broken_alike_for_both_sides
 9  finite on extremes                        test_divergence.test_finite_on_extremes
10  finite differences                        test_divergence.test_gradient_against_finite_differences
11  gradient into the student only            test_terms.test_only_the_student_receives_gradient
12  masked positions and samples are dead     test_terms.test_masked_positions_are_exactly_dead_even_if_they_hold_nan
13  a uniform ratio scales, clipped or not    test_terms.test_uniform_ratio_scales_loss_and_gradient
14  the expected ratio is 1                   test_properties.test_the_ratio_leaves_a_divergence_unbiased
15  sampled gradient is unbiased              test_divergence.test_sampled_gradient_is_the_reverse_kl_gradient_in_expectation
16  permuting samples                         test_properties.test_permuting_samples_permutes_their_losses
17  padding columns and rows                  test_properties.test_padding_changes_neither_loss_nor_gradient
18  micro-batches equal the batch             test_loop.test_micro_batches_equal_one_batch
19  samples weigh the same at any length      test_terms.test_sample_mean_keeps_every_sample_equal_whatever_its_length
20  all masked: a differentiable zero         test_terms.test_dead_batch_gives_a_zero_that_can_be_differentiated
21  old == current: ratio exactly 1           test_terms.test_behaviour_equal_to_the_student_gives_ratio_one_and_no_change
22  refresh: ratio 1 from step 2              test_loop.test_refresh_sets_the_ratio_to_one_after_step_one
23  stale rollouts: ratio off at step 1       test_loop.test_refresh_sets_the_ratio_to_one_after_step_one
24  n calls of one step == n steps            test_loop.test_n_single_steps_with_saved_state_equal_n_steps
25  bit-identical steps are noticed           test_loop.test_stale_state_is_noticed
26  clip of 1; bound of e^20                  test_terms.test_ratio_bounds
27  k3 zero, non-negative, flat beyond 20     test_terms.test_k3
28  base KL above 0 once trained              test_loop.test_healthy_runs_have_no_warnings_and_the_base_is_really_the_base
29  rates 0 and 1, geometric approach         test_teachers.test_distance_to_a_constant_student_shrinks_geometrically
30  float32 state moves, and is saved         test_teachers.test_float32_moves_where_bfloat16_would_stay
31  trust region is the geometric mixture     test_teachers.test_trust_region_is_the_normalised_geometric_mixture
32  average of the merged delta               test_teachers.test_average_of_the_merged_delta_not_of_the_factors
33  demonstrations: group, threshold, self    test_properties.test_a_demonstration_is_the_groups_first_other_success
34  nothing usable: prompt as it was, masked  test_properties.test_without_success_or_usable_feedback_nothing_changes
35  braces and other turns survive            test_properties.test_only_the_template_is_formatted
36  no header or response is ever cut         test_chat.test_oldest_standing_remarks_give_way_first
37  removal of thinking                       test_properties.test_thinking_is_removed_where_it_is_closed
38  low precision is scored in float32        test_divergence.test_low_precision_logits_are_scored_in_float32
39  any chunking equals the whole             test_properties.test_any_chunking_equals_the_whole
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.aggregation import aggregate
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.reprompt import RepromptRules, Rollout, reprompt, strip_thinking
from sdpo_core.terms import TokenTerms, token_terms
from sdpo_core.weights import importance_ratio

QUICK = settings(max_examples=25, deadline=None)
SPECS = (
    DivergenceSpec(0.0, "teacher", 3),
    DivergenceSpec(0.25, "student", 5, "renormalise"),
    DivergenceSpec(0.9, "full"),
    DivergenceSpec(1.0, "sampled"),
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def index_of(target: Target, row: int) -> Tensor | None:
    return None if target.index is None else target.index[row]


class Batch:
    """Inputs of a micro-batch whose rows have 1 to T tokens."""

    def __init__(self, seed: int, rows: int, length: int = 4, vocab: int = 7) -> None:
        g = torch.Generator().manual_seed(seed)
        self.student, self.teacher = draw(seed, rows, length, vocab), draw(seed + 1, rows, length, vocab)
        self.ids = torch.randint(0, vocab, (rows, length), generator=g)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
        self.mask = torch.arange(length) < lengths
        self.old = -torch.rand(rows, length, generator=g) * 3

    def terms(self, spec: DivergenceSpec) -> TokenTerms:
        target = dv.teacher_target(self.teacher, self.ids, spec)
        return token_terms(
            self.student, target, self.ids, self.mask, spec, is_clip=2.0, behaviour_BT=self.old, base_logp_BT=self.old
        )

    def moved(self, change: Any) -> Batch:
        other = Batch.__new__(Batch)
        other.__dict__ = {name: change(name, value) for name, value in self.__dict__.items()}
        return other


def test_ties_are_broken_alike_for_both_sides() -> None:
    """Every logit equal: whatever K tokens are taken, they are the same ones on both sides, so nothing differs."""
    flat = torch.zeros(2, 9)
    for support, k, alpha in itertools.product(("teacher", "student"), (1, 4, 9, 50), (0.0, 0.5, 1.0)):
        spec = DivergenceSpec(alpha, support, k)  # type: ignore[arg-type]
        ids = torch.zeros(2, dtype=torch.long)
        assert (
            float(dv.token_divergence(dv.scores(flat), dv.teacher_target(flat, ids, spec), ids, spec).abs().max())
            < 1e-6
        )
    teacher = draw(1, 2, 9)
    spec = DivergenceSpec(0.0, "teacher", 4)
    target = dv.teacher_target(teacher, torch.zeros(2, dtype=torch.long), spec)
    assert target.index is not None
    torch.testing.assert_close(target.logp, torch.log_softmax(teacher, -1).gather(-1, target.index))


@QUICK
@given(seed=st.integers(0, 1000), spec=st.sampled_from(SPECS[:3]))
def test_the_ratio_leaves_a_divergence_unbiased(seed: int, spec: DivergenceSpec) -> None:
    """Exact expectation over y ~ behaviour of ratio times divergence: the divergence itself does not depend on y."""
    student, teacher, behaviour = draw(seed, 1, 7), draw(seed + 1, 1, 7), torch.log_softmax(draw(seed + 2, 1, 7), -1)
    values, logp = [], torch.log_softmax(student, -1)
    for y in range(7):
        ids = torch.tensor([y])
        loss = dv.token_divergence(dv.scores(student), dv.teacher_target(teacher, ids, spec), ids, spec)
        ratio = importance_ratio(logp[:, y], behaviour[:, y], 1e9)
        values.append(float(behaviour[0, y].exp() * ratio * loss))
    assert sum(values) == pytest.approx(float(loss), rel=1e-4, abs=1e-6)


@QUICK
@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), spec=st.sampled_from(SPECS))
def test_permuting_samples_permutes_their_losses(seed: int, rows: int, spec: DivergenceSpec) -> None:
    batch = Batch(seed, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    whole, permuted = batch.terms(spec), batch.moved(lambda _, x: x[order]).terms(spec)
    for name in ("distill", "anchor", "gap", "ratio", "entropy", "logp"):
        torch.testing.assert_close(getattr(permuted, name), getattr(whole, name)[order])


@QUICK
@given(seed=st.integers(0, 1000), columns=st.integers(0, 3), dead=st.integers(0, 2), spec=st.sampled_from(SPECS))
def test_padding_changes_neither_loss_nor_gradient(seed: int, columns: int, dead: int, spec: DivergenceSpec) -> None:
    batch = Batch(seed, 3)

    def padded(name: str, x: Tensor) -> Tensor:
        fill: Any = {"mask": False, "ids": 0}.get(name, math.nan)
        wide = torch.cat([x, x.new_full((3, columns, *x.shape[2:]), fill)], 1)
        return torch.cat([wide, wide.new_full((dead, *wide.shape[1:]), fill)], 0)

    losses, gradients = [], []
    for one in (batch, batch.moved(padded)):
        one.student = one.student.clone().requires_grad_()
        terms = one.terms(spec)
        loss = aggregate(terms.distill + terms.anchor, one.mask, "seq-mean-token-mean")
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, one.student)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradients[1][:3, :4], gradients[0])
    assert float(gradients[1].abs().sum()) == pytest.approx(float(gradients[0].abs().sum()), rel=1e-5)


@QUICK
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 8),
    k=st.sampled_from([1, 3, 5, 11]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_chunking_equals_the_whole(seed: int, size: int, k: int, alpha: float) -> None:
    """Scored in pieces of any size along the response, T = 7 and V = 11 dividing by none of them."""
    student, teacher = draw(seed, 7, 11), draw(seed + 1, 7, 11)
    ids = torch.zeros(7, dtype=torch.long)
    spec = DivergenceSpec(alpha, "teacher", k)
    whole = dv.token_divergence(dv.scores(student), dv.teacher_target(teacher, ids, spec), ids, spec)
    parts = []
    for s, t, i in zip(student.split(size), teacher.split(size), ids.split(size), strict=True):
        parts.append(dv.token_divergence(dv.scores(s), dv.teacher_target(t, i, spec), i, spec))
    torch.testing.assert_close(torch.cat(parts), whole)


ROLLOUTS = st.lists(
    st.builds(
        Rollout,
        messages=st.just([{"role": "system", "content": "{sys}"}, {"role": "user", "content": "ask {x} {}"}]),
        uid=st.sampled_from(["a", "b"]),
        score=st.sampled_from([0.0, 0.5, 1.0]),
        response=st.sampled_from(["one {y}", "two", "<think>hm</think> three"]),
        feedback=st.sampled_from([None, "", "  ", 7, "wrong {z}"]),
    ),
    max_size=5,
)


@QUICK
@given(rollouts=ROLLOUTS, exclude=st.booleans())
def test_a_demonstration_is_the_groups_first_other_success(rollouts: list[Rollout], exclude: bool) -> None:
    """The threshold is inclusive; the same order gives the same choice."""
    rules = RepromptRules(exclude_self=exclude, success_threshold=0.5, strip_thinking=False)
    results = reprompt(rollouts, rules)
    assert results == reprompt(rollouts, rules)
    for i, (rollout, result) in enumerate(zip(rollouts, results, strict=True)):
        group = [j for j, r in enumerate(rollouts) if r.uid == rollout.uid and r.score >= 0.5]
        allowed = [j for j in group if j != i or not exclude]
        assert result.has_solution == bool(allowed)
        if allowed:
            assert rollouts[allowed[0]].response in result.messages[-1]["content"]


@QUICK
@given(rollouts=ROLLOUTS)
def test_without_success_or_usable_feedback_nothing_changes(rollouts: list[Rollout]) -> None:
    for rollout, result in zip(rollouts, reprompt(rollouts, RepromptRules(success_threshold=2.0)), strict=True):
        usable = isinstance(rollout.feedback, str) and bool(rollout.feedback.strip())
        assert result.taught == result.has_feedback == usable
        if not usable:
            assert result.messages == list(rollout.messages)


@QUICK
@given(rollouts=ROLLOUTS)
def test_only_the_template_is_formatted(rollouts: list[Rollout]) -> None:
    for rollout, result in zip(rollouts, reprompt(rollouts, RepromptRules()), strict=True):
        assert result.messages[:-1] == list(rollout.messages)[:-1]
        assert result.messages[-1]["content"].startswith("ask {x} {}")
        if result.has_feedback:
            assert result.messages[-1]["content"].endswith("wrong {z}")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>a</think> yes", "yes"),
        ("<think>a</think>\n\n<think>b\nc</think>yes", "yes"),
        ("yes <think>a</think>  and no", "yes and no"),
        ("<think>never closed", "<think>never closed"),
        ("opened by the prompt</think> yes", "opened by the prompt</think> yes"),
        ("", ""),
    ],
)
def test_thinking_is_removed_where_it_is_closed(text: str, want: str) -> None:
    assert strip_thinking(text) == want


def table() -> dict[int, tuple[str, str]]:
    rows = re.findall(r"^ ?(\d+)  .*? (test_\w+)\.(test_\w+)$", __doc__ or "", re.MULTILINE)
    return {int(number): (module, name) for number, module, name in rows}


def test_every_property_has_a_test() -> None:
    assert sorted(table()) == list(range(1, 40))


@pytest.mark.parametrize("number", range(1, 40))
def test_the_named_test_exists(number: int) -> None:
    module, name = table()[number]
    assert f"def {name}(" in (Path(__file__).parent / f"{module}.py").read_text()
