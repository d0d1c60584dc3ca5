"""Published choices through the same loop, each against a slow formula; and the guards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from sdpo_core import (
    AdapterError,
    BatchResult,
    LoraPolicy,
    LoraSpec,
    Options,
    Sample,
    SampleError,
    StepMetrics,
    TokenBatch,
    attached,
    detach,
    make_optimizer,
    train_batch,
)
from sdpo_core.policy import response_logits
from sdpo_core.presets import claas_hosted, openclaw_combined, user_interactions_offline, user_interactions_online
from sdpo_core.samples import pad_rows, token_batch
from sdpo_core.signals import (
    centred_hindsight_loss,
    clipped_policy_loss,
    combined_advantage,
    gained_advantage,
    hindsight_loss,
)
from sdpo_core.weights import k3
from tests.sdpo_core.conftest import adapter

OPTIONS = Options(support="full", steps=1, stop_gap=0.0, learning_rate=5e-3, measure_base_kl=True)
SAMPLES = [
    Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3), (-1.5, -3.0, -0.5, -2.0), reward_advantage=0.7),
    Sample((1, 4, 4, 9), (4, 5), (1, 9, 8), (-1.0, -2.0), reward_advantage=-1.2),
]
MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture
def policy(base: Qwen3ForCausalLM) -> LoraPolicy:
    """An adapter that is not the base model."""
    return adapter(base)


def run(policy: Any, options: Options = OPTIONS, samples: list[Sample] | None = None) -> BatchResult:
    return train_batch(policy, make_optimizer(policy, options), samples or SAMPLES, options)


@torch.no_grad()
def full_logp(policy: LoraPolicy, *, told: bool, adapter: bool) -> list[Tensor]:
    """(T, V) log-probs per sample, one sequence at a time."""
    found = []
    for s in SAMPLES:
        batch = token_batch([s.teacher_prompt_ids if told else s.prompt_ids], [s.response_ids], policy.device)
        found.append(torch.log_softmax(response_logits(policy, batch, adapter=adapter)[0], -1))
    return found


def chosen(logps: list[Tensor]) -> Tensor:
    """(B, T) of the response tokens, zero-padded."""
    return pad_rows([p[range(len(s.response_ids)), s.response_ids] for p, s in zip(logps, SAMPLES, strict=True)])


def recorded() -> Tensor:
    return pad_rows([torch.tensor(s.behaviour_logprobs) for s in SAMPLES])


def forward_kl(policy: LoraPolicy) -> Tensor:
    """(B, T), zero-padded: frozen base teacher."""
    teacher, student = full_logp(policy, told=True, adapter=False), full_logp(policy, told=False, adapter=True)
    return pad_rows([(t.exp() * (t - s)).sum(-1) for t, s in zip(teacher, student, strict=True)])


def test_dead_rows_dilute_trls_mean_and_no_other(policy: LoraPolicy) -> None:
    dead = [Sample((1, 2), (), (3,)), Sample((1, 2), (5, 6), (3,), taught=False)]
    rows = OPTIONS.replace(aggregation="row-mean-token-mean", learning_rate=1e-9)
    alone, mixed = run(policy, rows).steps[0], run(policy, rows, [*SAMPLES, *dead]).steps[0]
    assert mixed.loss == pytest.approx(alone.loss * 2 / 4, rel=1e-6)
    live = OPTIONS.replace(aggregation="seq-mean-token-mean", learning_rate=1e-9)
    assert run(policy, live, [*SAMPLES, *dead]).steps[0].loss == pytest.approx(run(policy, live).steps[0].loss)


def test_gradients_are_scaled_to_the_wanted_norm(policy: LoraPolicy) -> None:
    parameters = [p for _, p in policy.trainable()]
    before = [p.detach().clone() for p in parameters]
    options = OPTIONS.replace(max_grad_norm=1e-3, learning_rate=1.0)
    result = train_batch(policy, torch.optim.SGD(parameters), SAMPLES, options)
    moved = math.sqrt(
        sum(float((p.detach() - b).double().square().sum()) for p, b in zip(parameters, before, strict=True))
    )
    assert result.steps[0].grad_norm > 1e-2
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_previous_version_anchor(policy: LoraPolicy) -> None:
    """Zero at the first step, the k3 to the starting version at the second, and it holds the student back."""
    before = chosen(full_logp(policy, told=False, adapter=True))
    seen: list[float] = []

    def after(_: StepMetrics) -> None:
        seen.append(float((k3(chosen(full_logp(policy, told=False, adapter=True)), before) * MASK).sum() / MASK.sum()))

    options = OPTIONS.replace(steps=3, previous_kl_weight=0.5)
    result = train_batch(policy, make_optimizer(policy, options), SAMPLES, options, on_step=after)
    first, second, third = (m.previous_anchor_loss for m in result.steps)
    assert first == pytest.approx(0.0, abs=1e-9)
    assert [second, third] == pytest.approx(seen[:2], rel=1e-3)
    assert result.steps[1].loss == pytest.approx(result.steps[1].distill_loss + 0.5 * second, rel=1e-6)
    assert math.isnan(run(policy).steps[0].previous_anchor_loss)


def test_previous_version_anchor_holds_back(base: Qwen3ForCausalLM) -> None:
    drifts = []
    for weight in (0.0, 100.0):
        with attached(base, LoraSpec()) as policy:
            before = chosen(full_logp(policy, told=False, adapter=True))
            run(policy, OPTIONS.replace(steps=8, previous_kl_weight=weight))
            drifts.append(float((k3(chosen(full_logp(policy, told=False, adapter=True)), before) * MASK).sum()))
    assert drifts[1] < 0.5 * drifts[0]


def test_top_entropy_distils_the_uncertain_tokens_over_all_of_them(policy: LoraPolicy) -> None:
    student = full_logp(policy, told=False, adapter=True)
    entropy = pad_rows([-(p.exp() * p).sum(-1) for p in student])
    threshold = sorted(entropy[MASK.bool()].tolist())[3]  # the upper half of six
    keep = (entropy >= threshold) & MASK.bool()
    want = float((forward_kl(policy) * keep).sum() / 6)
    step = run(policy, OPTIONS.replace(top_entropy=0.5, is_clip=None, micro_batch_tokens=6)).steps[0]
    assert keep.sum() == 3
    assert step.distill_loss == pytest.approx(want, rel=1e-4)
    assert step.gap > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollout_correction_weights_the_loss_and_leaves_the_ratio_at_one(policy: LoraPolicy, level: str) -> None:
    log_ratio = (chosen(full_logp(policy, told=False, adapter=True)) - recorded()) * MASK
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.exp().clamp(max=1.5)
    want = float((forward_kl(policy) * weights * MASK).sum() / 6)
    options = OPTIONS.replace(rollout_correction=level, rollout_threshold=1.5)
    step = run(policy, options).steps[0]
    assert step.distill_loss == pytest.approx(want, rel=1e-4)
    assert step.mean_ratio == pytest.approx(1.0, abs=1e-5)


def test_rollout_correction_can_be_normalised_and_leaves_unrecorded_answers_alone(policy: LoraPolicy) -> None:
    unrecorded = [Sample(s.prompt_ids, s.response_ids, s.teacher_prompt_ids) for s in SAMPLES]
    options = OPTIONS.replace(rollout_correction="token", rollout_normalise=True, learning_rate=1e-9)
    assert run(policy, options, unrecorded).steps[0].loss == pytest.approx(
        run(policy, OPTIONS.replace(learning_rate=1e-9), unrecorded).steps[0].loss, rel=1e-5
    )


def test_trust_region_in_the_loop(policy: LoraPolicy) -> None:
    base, own = full_logp(policy, told=True, adapter=False), full_logp(policy, told=True, adapter=True)
    student = full_logp(policy, told=False, adapter=True)
    kls = []
    for b, o, s in zip(base, own, student, strict=True):
        teacher = torch.log_softmax(0.7 * b + 0.3 * o, -1)
        kls += (teacher.exp() * (teacher - s)).sum(-1).tolist()
    assert run(policy, OPTIONS.replace(teacher_mix=0.3)).steps[0].gap == pytest.approx(sum(kls) / 6, rel=1e-4)


def test_user_interactions_offline_is_the_published_loss(policy: LoraPolicy) -> None:
    own, told = (chosen(full_logp(policy, told=t, adapter=True)) for t in (False, True))
    want = float(hindsight_loss(own, told, MASK))
    assert run(policy, user_interactions_offline()).steps[0].loss == pytest.approx(want, rel=1e-4)


def test_user_interactions_online_is_the_published_loss(policy: LoraPolicy) -> None:
    own, told = (chosen(full_logp(policy, told=t, adapter=True)) for t in (False, True))
    want = centred_hindsight_loss(own, recorded(), told - own, MASK, clip_low=0.2, clip_high=0.2)
    assert run(policy, user_interactions_online()).steps[0].loss == pytest.approx(float(want), rel=1e-3)


def test_openclaws_combination_is_the_published_loss(policy: LoraPolicy) -> None:
    own, told = chosen(full_logp(policy, told=False, adapter=True)), chosen(full_logp(policy, told=True, adapter=False))
    reward = torch.tensor([[s.reward_advantage] for s in SAMPLES])
    advantage = combined_advantage(told, recorded(), reward, distill_weight=0.4, reward_weight=2.0)
    losses = clipped_policy_loss(own, recorded(), advantage, 0.2, 0.28) * MASK
    want = float((losses.sum(-1) / MASK.sum(-1)).mean())
    assert run(policy, openclaw_combined(0.4, 2.0)).steps[0].loss == pytest.approx(want, rel=1e-4)


def test_adaptive_kl_of_the_hosted_variant_is_the_published_one(policy: LoraPolicy) -> None:
    """With a target large enough that the gain differs between the answers."""
    own, told = chosen(full_logp(policy, told=False, adapter=True)), chosen(full_logp(policy, told=True, adapter=False))
    options = claas_hosted(0.5)
    assert options.policy_gradient is not None
    gaps = [float((told - recorded())[b, : len(s.response_ids)].abs().mean()) for b, s in enumerate(SAMPLES)]
    target = 2 * min(gaps)
    rows = []
    for b, s in enumerate(SAMPLES):
        n = len(s.response_ids)
        gained = gained_advantage(recorded()[b, :n], told[b, :n], 0.5, target=target)
        rows.append(float(-((own[b, :n] - recorded()[b, :n]).exp() * gained.advantages).sum()))
    rule = {**options.as_dict()["policy_gradient"], "gain_target": target}
    options = Options.from_dict({**options.as_dict(), "policy_gradient": rule})
    assert run(policy, options).steps[0].loss == pytest.approx(sum(rows) / 2, rel=1e-4)


def test_the_policy_gradients_ratio_carries_gradient(policy: LoraPolicy) -> None:
    """At r = 1 the gradients of r A and of A log r agree; away from it they differ by r."""
    norms = {}
    for shift in (0.0, 1.0):
        own = chosen(full_logp(policy, told=False, adapter=True))[1, :2] - shift
        samples = [Sample(SAMPLES[1].prompt_ids, SAMPLES[1].response_ids, (1, 9, 8), tuple(own.tolist()))]
        options = claas_hosted().replace(learning_rate=1e-9)
        rule = {**options.as_dict()["policy_gradient"], "reference": "student"}
        options = Options.from_dict({**options.as_dict(), "policy_gradient": rule})
        norms[shift] = run(policy, options, samples).steps[0].grad_norm
    assert norms[1.0] == pytest.approx(math.e * norms[0.0], rel=1e-3)


def test_answers_the_teacher_wrote_have_no_ratio(policy: LoraPolicy) -> None:
    written = [Sample(s.prompt_ids, s.response_ids, s.teacher_prompt_ids, teacher_written=True) for s in SAMPLES]
    result = run(policy, OPTIONS.replace(steps=3, refresh=False), written)
    assert [m.mean_ratio for m in result.steps] == [1.0, 1.0, 1.0]
    assert result.steps[-1].loss < result.steps[0].loss
    with pytest.raises(SampleError, match="teacher wrote"):
        Sample((1,), (2,), (3,), (-1.0,), teacher_written=True)
    with pytest.raises(SampleError, match="not finite"):
        Sample((1,), (2,), (3,), reward_advantage=math.inf)


class Broken:
    """A policy whose `adapter=False` does something else."""

    def __init__(self, inner: LoraPolicy, bare: Callable[[LoraPolicy, TokenBatch], Tensor]) -> None:
        self.inner, self.bare, self.device = inner, bare, inner.device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self.inner.trainable()

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        return self.inner.logits(batch, adapter=True) if adapter else self.bare(self.inner, batch)


def test_a_base_pass_with_the_adapter_on_is_noticed(policy: LoraPolicy) -> None:
    """In the first batch nothing is wrong yet; once trained, a distance of exactly 0 is impossible."""
    broken = Broken(policy, lambda inner, batch: inner.logits(batch, adapter=True).detach())
    optimizer = make_optimizer(broken, OPTIONS)
    assert train_batch(broken, optimizer, SAMPLES, OPTIONS).warnings == ()
    again = train_batch(broken, optimizer, SAMPLES, OPTIONS)
    assert [w.code for w in again.warnings] == ["base_not_bare"]
    healthy = train_batch(policy, optimizer, SAMPLES, OPTIONS)
    assert healthy.warnings == ()


def test_a_changed_base_is_noticed_in_the_batch_and_at_the_end_of_the_job(base: Qwen3ForCausalLM) -> None:
    def leaking_job() -> None:
        with attached(base, LoraSpec()) as policy:
            assert run(policy).warnings == ()
            with torch.no_grad():
                base.model.layers[0].mlp.down_proj.base_layer.weight.mul_(1.01)
            assert [w.code for w in run(policy).warnings] == ["base_changed"]

    with pytest.raises(AdapterError, match="changed while"):
        leaking_job()
    with attached(base, LoraSpec()) as policy:
        assert run(policy).warnings == ()


def test_an_adapter_merged_into_the_base_is_noticed(policy: LoraPolicy) -> None:
    policy.model.merge_adapter()
    layers = [m for m in policy.model.modules() if hasattr(m, "merged_adapters")]
    for layer in layers:
        layer.merged_adapters.clear()  # the leak: nobody remembers that it was merged
    assert "base_changed" in {w.code for w in run(policy).warnings}


def test_codes_are_part_of_a_warnings_text(policy: LoraPolicy) -> None:
    with torch.no_grad():
        policy.trainable()[0][1].fill_(math.nan)
    (warning,) = run(policy, OPTIONS.replace(measure_base_kl=False)).warnings
    assert str(warning).startswith("non_finite_step: step 1")
    detach(policy)
