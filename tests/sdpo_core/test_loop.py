"""The training loop on a tiny random model with a real LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from sdpo_core import (
    BatchResult,
    LoraPolicy,
    LoraSpec,
    Options,
    Sample,
    SampleError,
    StepMetrics,
    TokenBatch,
    attach_lora,
    attached,
    claas,
    detach,
    load_optimizer,
    make_optimizer,
    save_lora,
    save_optimizer,
    train_batch,
)

K = 7
OPTIONS = Options(
    top_k=K, steps=3, stop_gap=0.0, learning_rate=5e-3, path="plain", measure_base_kl=True
)  # fmt: skip


def batch(behaviour: bool = True) -> list[Sample]:
    """Four answers of different lengths whose teachers see other prompts."""
    g = torch.Generator().manual_seed(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 64, (n,), generator=g).tolist())

    samples = []
    for prompt, response, teacher in ((4, 6, 9), (7, 2, 8), (3, 5, 12), (5, 1, 6)):
        logps = tuple((-torch.rand(response, generator=g) * 4).tolist()) if behaviour else None
        samples.append(Sample(ids(prompt), ids(response), ids(teacher), logps))
    return samples


def nudged(base: Qwen3ForCausalLM, seed: int = 1) -> LoraPolicy:
    """An adapter that is not the base model: B is random as well."""
    policy = attach_lora(base, LoraSpec(rank=4, alpha=8, seed=seed))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return policy


def weights(policy: LoraPolicy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable()}


def run(policy: LoraPolicy, options: Options = OPTIONS, samples: Sequence[Sample] | None = None) -> BatchResult:
    return train_batch(policy, make_optimizer(policy, options), samples or batch(), options)


def slow_logp(policy: LoraPolicy, prompt: Sequence[int], response: Sequence[int], adapter: bool) -> Tensor:
    """(T, V) float64 log-probs of one sequence alone: no padding, no batching."""
    ids = torch.tensor([[*prompt, *response]])

    def forward() -> Tensor:
        logits: Tensor = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double(), -1)

    if adapter:
        return forward()
    with torch.no_grad(), policy.model.disable_adapter():
        return forward()


def slow_loss(policy: LoraPolicy, samples: Sequence[Sample], clip: float, anchor: float) -> Tensor:
    """Forward KL on the teacher's top K and a tail bucket, times the clipped ratio, token mean, plus k3 to the base."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for s in samples:
        teacher = slow_logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=False)
        base = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=False)
        student = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=True)
        assert s.behaviour_logprobs is not None
        for t, y in enumerate(s.response_ids):
            top = sorted(range(64), key=lambda v: -float(teacher[t, v]))[:K]
            rest = [v for v in range(64) if v not in top]
            p, q = teacher[t].exp(), student[t].exp()
            kl = sum(p[v] * (p[v] / q[v]).log() for v in top) + p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
            ratio = min(math.exp(float(student[t, y].detach()) - s.behaviour_logprobs[t]), clip)
            d = student[t, y] - base[t, y]
            total = total + ratio * kl + anchor * (d.exp() - 1 - d)
            tokens += 1
    return total / tokens


def test_first_step_equals_the_slow_formula(base: Qwen3ForCausalLM) -> None:
    """Loss, gradient norm, and the gradient itself through one plain SGD step."""
    policy, samples = nudged(base), batch()
    loss = slow_loss(policy, samples, clip=2.0, anchor=0.3)
    parameters = [p for _, p in policy.trainable()]
    gradients = torch.autograd.grad(loss, parameters)
    norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    before = weights(policy)
    options = OPTIONS.replace(steps=1, base_kl_weight=0.3, max_grad_norm=1e6, micro_batch_tokens=20, learning_rate=0.1)
    result = train_batch(policy, torch.optim.SGD(parameters), samples, options)
    assert result.steps[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.steps[0].grad_norm == pytest.approx(norm, rel=1e-4)
    for (name, after), gradient in zip(weights(policy).items(), gradients, strict=True):
        torch.testing.assert_close(before[name] - after, 0.1 * gradient, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_micro_batches_equal_one_batch(base: Qwen3ForCausalLM, aggregation: str) -> None:
    results = []
    for tokens in (10_000, 24, 1):
        policy = nudged(base)
        options = OPTIONS.replace(aggregation=aggregation, micro_batch_tokens=tokens, base_kl_weight=0.1)
        results.append((run(policy, options), weights(policy)))
        detach(policy)
    (whole, whole_weights), *parts = results
    for part, part_weights in parts:
        for a, b in zip(whole.steps, part.steps, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-5)
            assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
            assert b.mean_ratio == pytest.approx(a.mean_ratio, rel=1e-5)
            assert b.gap == pytest.approx(a.gap, rel=1e-5)
        for name, value in whole_weights.items():
            torch.testing.assert_close(part_weights[name], value, atol=2e-4, rtol=1e-3)


def test_same_seed_same_bits(base: Qwen3ForCausalLM) -> None:
    seen = []
    for _ in range(2):
        with attached(base, LoraSpec(seed=5)) as policy:
            result = run(policy)
            seen.append(([(m.loss, m.grad_norm, m.gap) for m in result.steps], weights(policy)))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


def test_order_of_samples_does_not_matter(base: Qwen3ForCausalLM) -> None:
    losses = []
    for samples in (batch(), batch()[::-1]):
        policy = nudged(base)
        losses.append(run(policy, samples=samples).steps[-1].loss)
        detach(policy)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_refresh_sets_the_ratio_to_one_after_step_one(base: Qwen3ForCausalLM) -> None:
    histories: dict[bool, tuple[StepMetrics, ...]] = {}
    for refresh in (True, False):
        policy = nudged(base)
        histories[refresh] = run(policy, OPTIONS.replace(refresh=refresh)).steps
        detach(policy)
    on, off = histories[True], histories[False]
    assert on[0].loss == off[0].loss
    assert on[0].grad_norm == off[0].grad_norm
    assert on[0].mean_ratio != 1
    for a, b in zip(on[1:], off[1:], strict=True):
        assert (a.mean_ratio, a.max_ratio, a.clip_fraction) == (1.0, 1.0, 0.0)
        assert b.mean_ratio != 1
        assert a.loss != b.loss
    assert len({m.loss for m in on}) == len(on)


def test_unknown_behaviour_is_the_starting_policy_and_is_reported(base: Qwen3ForCausalLM) -> None:
    """Against the log-probs that the starting weights give when asked beforehand: same ratios, to rounding."""
    unknown = batch(behaviour=False)
    policy = nudged(base)
    known = []
    for s in unknown:
        logp = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=True).detach()
        own = tuple(float(logp[t, y]) for t, y in enumerate(s.response_ids))
        known.append(Sample(s.prompt_ids, s.response_ids, s.teacher_prompt_ids, own))
    options = OPTIONS.replace(refresh=False)
    given = run(policy, options, known)
    detach(policy)
    policy = nudged(base)
    computed = run(policy, options, unknown)
    assert computed.steps[0].mean_ratio == 1.0
    assert {o.behaviour for o in computed.samples} == {"recomputed"}
    assert {o.behaviour for o in given.samples} == {"engine"}
    for a, b in zip(given.steps, computed.steps, strict=True):
        assert b.mean_ratio == pytest.approx(a.mean_ratio, rel=1e-4)
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_n_single_steps_with_saved_state_equal_n_steps(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    """Adapter and optimizer go through files between the steps; without refresh the result is the same to the bit."""
    options = OPTIONS.replace(refresh=False)
    policy = nudged(base)
    save_lora(policy, tmp_path / "0", base_model_name_or_path="tiny")
    whole = run(policy, options)
    want = weights(policy)
    detach(policy)
    losses = []
    for i in range(options.steps):
        with attached(base, tmp_path / str(i)) as part:
            one = options.replace(steps=1)
            optimizer = load_optimizer(part, one, tmp_path / str(i)) if i else make_optimizer(part, one)
            losses.append(train_batch(part, optimizer, batch(), one).steps[0].loss)
            save_lora(part, tmp_path / str(i + 1), base_model_name_or_path="tiny")
            save_optimizer(part, optimizer, tmp_path / str(i + 1))
            got = weights(part)
    assert losses == [m.loss for m in whole.steps]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_samples_that_teach_nothing_are_counted_and_change_nothing(base: Qwen3ForCausalLM) -> None:
    dead = [
        Sample((1, 2), (), (3, 4)),
        Sample((1, 2), (5, 6), (3, 4), taught=False),
    ]
    outcomes = []
    for samples in (batch(), [dead[0], *batch(), dead[1]]):
        policy = nudged(base)
        outcomes.append((run(policy, samples=samples), weights(policy)))
        detach(policy)
    (clean, clean_weights), (mixed, mixed_weights) = outcomes
    assert [m.loss for m in clean.steps] == [m.loss for m in mixed.steps]
    assert all(torch.equal(clean_weights[n], mixed_weights[n]) for n in clean_weights)
    assert mixed.masked_samples == 2
    assert [o.reason for o in mixed.samples] == ["empty_response", "", "", "", "", "no_feedback"]


def test_nothing_to_teach_moves_nothing(base: Qwen3ForCausalLM) -> None:
    policy = nudged(base)
    before = weights(policy)
    result = run(policy, samples=[Sample((1, 2), (), (3, 4))])
    assert (result.stop_reason, result.updates, result.steps) == ("nothing_to_teach", 0, ())
    assert all(torch.equal(before[n], w) for n, w in weights(policy).items())


def test_a_closed_gap_stops_before_any_update(base: Qwen3ForCausalLM) -> None:
    """A teacher that is told nothing new agrees with a fresh adapter: praise changes nothing."""
    same = [Sample(s.prompt_ids, s.response_ids, s.prompt_ids, s.behaviour_logprobs) for s in batch()]
    policy = attach_lora(base, LoraSpec())
    before = weights(policy)
    result = run(policy, OPTIONS.replace(stop_gap=1e-3), same)
    assert result.stop_reason == "gap_closed"
    assert [m.outcome for m in result.steps] == ["gap_closed"]
    assert all(torch.equal(before[n], w) for n, w in weights(policy).items())


def test_relative_stop(base: Qwen3ForCausalLM) -> None:
    policy = nudged(base)
    result = run(policy, OPTIONS.replace(steps=40, stop_gap_ratio=0.5))
    assert result.stop_reason == "gap_closed"
    assert result.steps[-1].peak_gap < 0.5 * result.steps[0].peak_gap
    assert all(m.peak_gap >= 0.5 * result.steps[0].peak_gap for m in result.steps[:-1])


def test_peak_gap_is_the_mean_of_each_answers_worst_token(base: Qwen3ForCausalLM) -> None:
    policy, samples = nudged(base), batch()
    peaks = []
    for s in samples:
        teacher = slow_logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=False)
        student = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=True).detach()
        peaks.append(float((teacher.exp() * (teacher - student)).sum(-1).max()))
    metrics = run(policy, OPTIONS.replace(support="full", steps=1, micro_batch_tokens=24)).steps[0]
    assert metrics.peak_gap == pytest.approx(sum(peaks) / len(peaks), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.1}, {"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 0.5, "outside": "renormalise"}, {"top_k": 2},
        {"support": "full"}, {"alpha": 0.5, "support": "student", "top_k": 5},
        {"alpha": 1.0, "support": "sampled", "top_k": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_a_stop_gap_means_the_same_whatever_is_trained(
    base: Qwen3ForCausalLM, changes: dict[str, Any], path: Literal["plain", "fast"]
) -> None:
    """The same weights stop below the same number of nats, be the trained divergence bounded or no distance at all."""
    policy = nudged(base)
    gap = run(policy, OPTIONS.replace(top_k=100, steps=1, learning_rate=1e-9)).steps[0].peak_gap
    assert gap > math.log(2.0), "more than any mixture can reach"
    for stop, outcome in ((gap * 0.999, "updated"), (gap * 1.001, "gap_closed")):
        options = OPTIONS.replace(top_k=100, steps=1, path=path, stop_gap=stop, learning_rate=1e-9).replace(**changes)
        step = run(policy, options).steps[0]
        assert step.outcome == outcome
        assert step.peak_gap == pytest.approx(gap, rel=1e-4)


def test_callbacks_see_every_step_and_can_stop(base: Qwen3ForCausalLM) -> None:
    policy, seen = nudged(base), list[StepMetrics]()
    result = train_batch(
        policy, make_optimizer(policy, OPTIONS), batch(), OPTIONS,
        on_step=seen.append, should_stop=lambda: len(seen) == 2,
    )  # fmt: skip
    assert result.stop_reason == "cancelled"
    assert tuple(seen) == result.steps
    assert [m.step for m in seen] == [1, 2]


class Wrapped:
    """A policy whose adapter logits pass through a function of the call's number."""

    def __init__(self, inner: LoraPolicy, change: Callable[[int, Tensor], Tensor]) -> None:
        self.inner, self.change, self.calls = inner, change, 0
        self.device = inner.device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self.inner.trainable()

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        logits = self.inner.logits(batch, adapter=adapter)
        if not adapter:
            return logits
        self.calls += 1
        return self.change(self.calls, logits)


def test_a_non_finite_gradient_skips_the_step(base: Qwen3ForCausalLM) -> None:
    inner = nudged(base)
    policy = Wrapped(inner, lambda call, logits: logits * (math.nan if call == 2 else 1.0))
    snapshots: list[dict[str, Tensor]] = []
    optimizer = make_optimizer(policy, OPTIONS)
    result = train_batch(policy, optimizer, batch(), OPTIONS, on_step=lambda _: snapshots.append(weights(inner)))
    assert [m.outcome for m in result.steps] == ["updated", "non_finite", "updated"]
    assert (result.updates, result.skipped_non_finite) == (2, 1)
    assert all(torch.equal(snapshots[0][n], snapshots[1][n]) for n in snapshots[0])
    assert all(bool(torch.isfinite(w).all()) for w in snapshots[2].values())


class StalePolicy:
    """Weights move, answers do not: logits were computed once and cached, only their gradient is live."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.theta = nn.Parameter(torch.zeros(64))
        self.cached = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("theta", self.theta)]

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        rows, length = batch.ids_BN.shape
        logits = self.cached[:rows, batch.first_logit : length]
        return logits + (self.theta - self.theta.detach()) if adapter else logits.flip(-1)


def test_stale_state_is_noticed() -> None:
    policy = StalePolicy()
    result = train_batch(policy, make_optimizer(policy, OPTIONS), batch(), OPTIONS.replace(is_clip=None))
    assert result.updates == 3
    assert bool((policy.theta != 0).any())
    assert len(result.warnings) == 2
    assert {w.code for w in result.warnings} == {"stale_metrics"}
    assert "bit-identical" in str(result.warnings[0])


def test_healthy_runs_have_no_warnings_and_the_base_is_really_the_base(base: Qwen3ForCausalLM) -> None:
    """The anchor is zero with a fresh adapter and grows once it moves."""
    policy = attach_lora(base, LoraSpec())
    result = run(policy)
    assert result.warnings == ()
    assert result.steps[0].anchor_loss == pytest.approx(0.0, abs=1e-9)
    assert all(m.anchor_loss > 1e-6 for m in result.steps[1:])


def test_learning_closes_the_gap(base: Qwen3ForCausalLM) -> None:
    policy = attach_lora(base, LoraSpec())
    result = run(policy, OPTIONS.replace(steps=40, learning_rate=1e-2))
    assert result.steps[-1].gap < 0.3 * result.steps[0].gap


@pytest.mark.parametrize(
    "options",
    [
        claas(top_k=K, learning_rate=5e-3, steps=3),
        claas(1.0, top_k=K, learning_rate=5e-3, steps=3),
        OPTIONS.replace(alpha=0.5, support="student"),
        OPTIONS.replace(alpha=1.0, support="full"),
        OPTIONS.replace(alpha=1.0, support="sampled", top_k=None),
        OPTIONS.replace(teacher_mix=0.1),
        OPTIONS.replace(is_clip=None),
    ],
)  # fmt: skip
def test_every_kind_of_option_runs_and_moves(base: Qwen3ForCausalLM, options: Options) -> None:
    policy = nudged(base)
    before = weights(policy)
    result = run(policy, options)
    assert result.updates == 3
    assert all(math.isfinite(m.loss) and m.gap >= 0 and m.grad_norm > 0 for m in result.steps)
    assert any(not torch.equal(before[n], w) for n, w in weights(policy).items())


def test_trust_region_teacher_is_the_mixture(base: Qwen3ForCausalLM) -> None:
    """teacher_mix 1 is the current adapter told the feedback; its gap is found by hand."""
    policy, samples = nudged(base), batch()
    options = OPTIONS.replace(teacher_mix=1.0, support="full", steps=1)
    kls = []
    for s in samples:
        teacher = slow_logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=True).detach()
        student = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=True).detach()
        kls += (teacher.exp() * (teacher - student)).sum(-1).tolist()
    assert run(policy, options).steps[0].gap == pytest.approx(sum(kls) / len(kls), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": ()}, "at least one token"),
        ({"behaviour_logprobs": (-1.0,)}, "1 behaviour log-probs for a response of 2"),
        ({"behaviour_logprobs": (-1.0, math.nan)}, "not finite"),
    ],
)
def test_malformed_samples_are_refused(fields: dict[str, tuple[float, ...]], message: str) -> None:
    values = {"prompt_ids": (1,), "response_ids": (2, 3), "teacher_prompt_ids": (4,), **fields}
    with pytest.raises(SampleError, match=message):
        Sample(**values)  # type: ignore[arg-type]


def test_reported_base_kl_is_the_full_kl_of_each_step(base: Qwen3ForCausalLM) -> None:
    """V = 64 is less than the 100 kept tokens: nothing is merged, and the report equals the slow KL."""
    policy, samples = nudged(base), batch()
    total, tokens = 0.0, 0
    for s in samples:
        student = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=True).detach()
        anchor = slow_logp(policy, s.prompt_ids, s.response_ids, adapter=False)
        total += float((student.exp() * (student - anchor)).sum())
        tokens += len(s.response_ids)
    reported = run(policy).steps
    assert reported[0].base_kl == pytest.approx(total / tokens, rel=1e-4)
    assert reported[1].base_kl != reported[0].base_kl
