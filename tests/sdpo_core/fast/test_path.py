"""The fast path in the training loop against the plain one: whole batches, ragged, with the ratio clipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sdpo_core import (
    BatchResult,
    LoraPolicy,
    LoraSpec,
    OptionError,
    Options,
    Policy,
    Sample,
    StepMetrics,
    TargetError,
    TokenBatch,
    attach_lora,
    detach,
    make_ema,
    make_optimizer,
    teacher_targets,
    train_batch,
)
from sdpo_core.fast.packing import PackedBatch, pack
from sdpo_core.fast.scores import Head
from sdpo_core.signals import PolicyGradient
from tests.sdpo_core.conftest import adapter

OPTIONS = Options(top_k=9, steps=4, stop_gap=0.0, learning_rate=1e-3, is_clip=1.5, refresh=False)


def model(layers: int = 2, vocabulary: int = 131, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(dtype).eval()


def batch(seed: int = 0, vocabulary: int = 131) -> list[Sample]:
    """Ragged in every direction, one answer of a single token, one dead sample, one without behaviour log-probs."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=g).tolist())

    samples = []
    for prompt, response, teacher in ((4, 16, 9), (13, 5, 20), (3, 1, 7), (6, 11, 6), (1, 8, 30)):
        logps = tuple((-2.0 - 4.0 * torch.rand(response, generator=g)).tolist())
        samples.append(Sample(ids(prompt), ids(response), ids(teacher), logps))
    samples.insert(2, Sample(ids(3), ids(4), ids(5), taught=False))
    samples[0] = dataclasses.replace(samples[0], reward_advantage=1.5)
    samples[4] = dataclasses.replace(samples[4], behaviour_logprobs=None)
    return samples


class Ran:
    """One batch through one path: the result, the gradient of the last step, the weights after it."""

    def __init__(self, options: Options, *, dtype: torch.dtype = torch.float32) -> None:
        policy = adapter(model(dtype=dtype))
        ema = make_ema(policy) if options.teacher == "ema" else None
        self.result = train_batch(policy, make_optimizer(policy, options), batch(), options, ema=ema)
        self.gradient = torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None])
        self.weights = torch.cat([p.detach().flatten() for _, p in policy.trainable()])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


SAMPLED: dict[str, Any] = {"alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": None}
COVERED: dict[str, dict[str, Any]] = {
    "forward KL and tail": {},
    "reverse KL and tail": {"alpha": 1.0},
    "mixture renormalised": {"alpha": 0.5, "outside": "renormalise"},
    "sampled token": {"alpha": 1.0, "support": "sampled", "top_k": None},
    "sampled token with a floor": {"alpha": 1.0, "support": "sampled"},
    "advantages of the student, centred and gained": {
        **SAMPLED, "policy_gradient": PolicyGradient(centre=True, gain_target=3.0, clip_low=0.2, clip_high=0.3),
        "chunk_tokens": 3,
    },
    "advantages of the rollout and a reward": {
        **SAMPLED, "micro_batch_tokens": 40, "previous_kl_weight": 0.1,
        "policy_gradient": PolicyGradient(reference="behaviour", distill_weight=0.5, reward_weight=2.0),
    },
    "anchors": {"base_kl_weight": 0.2, "previous_kl_weight": 0.3},
    "measured base": {"measure_base_kl": True},
    "the student's tokens and a tail": {"support": "student", "alpha": 0.5},
    "the student's tokens, renormalised, in small chunks": {
        "support": "student", "alpha": 0.5, "outside": "renormalise", "chunk_tokens": 3,
    },
    "the student's tokens, a moving average, mixed": {
        "support": "student", "alpha": 1.0, "teacher": "ema", "teacher_mix": 0.3, "measure_base_kl": True,
    },
    "the full vocabulary": {"support": "full", "alpha": 0.5, "top_k": None},
    "the full vocabulary with anchors, in small chunks": {
        "support": "full", "alpha": 0.0, "top_k": None, "base_kl_weight": 0.2, "previous_kl_weight": 0.3,
        "chunk_tokens": 3, "micro_batch_tokens": 30,
    },
    "refresh": {"refresh": True},
    "no ratio": {"is_clip": None},
    "live teacher": {"teacher": "live"},
    "previous teacher": {"teacher": "previous"},
    "moving average": {"teacher": "ema"},
    "trust region": {"teacher_mix": 0.3},
    "rollout correction": {"rollout_correction": "sequence", "rollout_normalise": True},
    "top entropy": {"top_entropy": 0.5},
    "row means": {"aggregation": "row-mean-token-mean"},
    "small micro-batches": {"micro_batch_tokens": 25},
    "small chunks": {"chunk_tokens": 3},
    "checkpointing": {"checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_four_steps_equal_the_plain_path(name: str) -> None:
    """Every metric of every step, and the gradient of the fourth, after three updates of each path's own."""
    changes = {"max_grad_norm": 1e6, **COVERED[name]}
    fast, plain = (Ran(OPTIONS.replace(path=path, **changes)) for path in ("fast", "plain"))
    assert {s.path for s in fast.result.steps} == {"fast"}
    assert {s.path for s in plain.result.steps} == {"plain"}
    same_metrics(fast.result, plain.result)
    assert relative(fast.gradient, plain.gradient) <= 2e-5


def same_metrics(found: BatchResult, expected: BatchResult, tolerance: float = 2e-5) -> None:
    assert len(found.steps) == len(expected.steps)
    for a, b in zip(found.steps, expected.steps, strict=True):
        for field in dataclasses.fields(a):
            value = getattr(b, field.name)
            if isinstance(value, float) and field.name != "seconds":
                close = pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)
                assert getattr(a, field.name) == close, (a.step, field.name)


def test_four_steps_with_the_ratio_clipped_to_1e_5() -> None:
    """Must-show 1: ragged lengths, active clipping, SGD so that the comparison is of gradients and nothing else."""
    gradients, clipped = [], []
    for path in ("fast", "plain"):
        policy = adapter(model())
        options = OPTIONS.replace(path=path, alpha=0.5, max_grad_norm=1e6, learning_rate=0.05)
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()])
        steps = train_batch(policy, optimizer, batch(), options).steps
        clipped.append([s.clip_fraction for s in steps])
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None]))
    assert all(0.05 < c < 0.95 for c in clipped[0])
    assert clipped[0] == pytest.approx(clipped[1])
    assert relative(*gradients) <= 1e-5


def test_bfloat16_base_to_1e_2() -> None:
    """The base in bfloat16, the adapter in float32: rounding differs by the order of a sum and no more."""
    changes = {"steps": 1, "max_grad_norm": 1e6, "alpha": 0.5, "outside": "renormalise"}
    fast, plain = (Ran(OPTIONS.replace(path=p, **changes), dtype=torch.bfloat16) for p in ("fast", "plain"))
    assert relative(fast.gradient, plain.gradient) <= 1e-2


def test_the_path_says_its_name_and_why_it_is_the_plain_one() -> None:
    def first(policy: Policy, path: str) -> StepMetrics:
        options = OPTIONS.replace(steps=1, path=path)
        return train_batch(policy, make_optimizer(policy, options), batch(), options).steps[0]

    class LogitsOnly:
        """All of a policy, and nothing more."""

        def __init__(self, inner: LoraPolicy) -> None:
            self.device, self.trainable, self.logits = inner.device, inner.trainable, inner.logits

    asked = (adapter(model()), "plain"), (adapter(model()), "auto"), (LogitsOnly(adapter(model())), "fast")
    steps = [first(policy, path) for policy, path in asked]
    assert [(s.path, s.fallback_reason) for s in steps] == [
        ("plain", ""), ("fast", ""), ("plain", "the policy gives logits only, no hidden states"),
    ]  # fmt: skip


@pytest.mark.parametrize(("support", "top_k"), [("student", 9), ("full", None)])
@pytest.mark.parametrize(("ahead", "then"), [("fast", "plain"), ("plain", "fast"), ("fast", "fast")])
def test_what_one_path_scored_ahead_the_other_can_read(support: str, top_k: int | None, ahead: str, then: str) -> None:
    """A teacher's whole rows, and in their place what the head was given: the same batch."""
    options = OPTIONS.replace(support=support, top_k=top_k, alpha=0.5, steps=2)
    policy = adapter(model())
    targets = teacher_targets(policy, batch(), options.replace(path=ahead))
    widths = {t.target.logp.shape[1:] for t in targets if t.target.logp.numel()}
    assert widths == ({torch.Size([])} if ahead == "fast" else {torch.Size([131])})
    options = options.replace(path=then)
    found = train_batch(policy, make_optimizer(policy, options), batch(), options, targets=targets)
    assert found.steps[0].path == then
    same_metrics(found, Ran(options).result)


def test_audit_of_whole_rows_finds_rounding_only() -> None:
    options = OPTIONS.replace(support="student", alpha=0.5, audit=True, steps=2)
    for metrics in Ran(options).result.steps:
        assert metrics.audit is not None
        assert max(vars(metrics.audit).values()) < 1e-4
        assert metrics.audit.teacher > 0


def test_a_window_that_only_the_mask_knows_is_noticed() -> None:
    """Qwen2-MoE's attention takes its window from the mask, which a packed batch does not have."""
    shape: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
        "use_sliding_window": True, "max_window_layers": 1, "initializer_range": 0.3,
    }  # fmt: skip
    for window in (8, 1024):
        torch.manual_seed(0)
        config = Qwen2MoeConfig(**shape, sliding_window=window)
        policy = attach_lora(Qwen2MoeForCausalLM(config).eval(), LoraSpec(target_modules=("q_proj", "v_proj")))
        assert policy.obstacle() != "", window


def test_a_soft_cap_is_noticed() -> None:
    """A model whose logits are not its head's alone, and one whose attention slides: refused, and packed."""
    shape: dict[str, Any] = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 6,
    }  # fmt: skip
    torch.manual_seed(0)
    capped = adapter(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.5)).eval())
    assert capped.obstacle() != ""
    same = []
    for path in ("fast", "plain"):
        torch.manual_seed(0)
        policy = adapter(MistralForCausalLM(MistralConfig(**shape)).eval())
        options = OPTIONS.replace(path=path, steps=2)
        same.append(train_batch(policy, make_optimizer(policy, options), batch(), options))
        assert same[-1].steps[0].path == path
    same_metrics(*same)


def test_packed_sequences_do_not_see_each_other() -> None:
    """Other neighbours, other order: the same hidden states."""
    policy, samples = adapter(model()), [s for s in batch() if s.live]

    def hidden(part: list[Sample]) -> list[Tensor]:
        packed = pack([s.prompt_ids for s in part], [s.response_ids for s in part], policy.device)
        states_NH = policy.hidden(packed, adapter=True).detach()
        return list(states_NH.split(packed.response_lengths))

    together, backwards = hidden(samples), hidden(samples[::-1])[::-1]
    for row, sample in enumerate(samples):
        (alone_TH,) = hidden([sample])
        for found_TH in (together[row], backwards[row]):
            torch.testing.assert_close(found_TH, alone_TH, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    base = model()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    attention = base.config._attn_implementation
    policy = adapter(base)
    options = OPTIONS.replace(path="fast", checkpointing=True)
    train_batch(policy, make_optimizer(policy, options), batch(), options)
    assert not any(m.training for m in base.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    assert not any("forward" in vars(m) for m in base.modules())
    detach(policy)
    assert base.config._attn_implementation == attention
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


def test_audit_reports_small_differences_and_trains_the_same() -> None:
    audited, fast = (Ran(OPTIONS.replace(path="fast", audit=on, micro_batch_tokens=40)) for on in (True, False))
    assert relative(audited.weights, fast.weights) <= 1e-6
    for step in audited.result.steps:
        assert step.audit is not None
        assert 0.0 < step.audit.gradient <= 1e-5
        assert max(step.audit.loss, step.audit.tokens, step.audit.teacher) <= 1e-4
    assert fast.result.steps[0].audit is None


class Defective(LoraPolicy):
    """Hidden states that are off by a thousandth, as of a kernel that lost a term."""

    def hidden(
        self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False
    ) -> Tensor:
        return super().hidden(batch, adapter=adapter, checkpointing=checkpointing, compiled=compiled) * 1.001


def test_audit_tells_a_defect() -> None:
    policy = Defective(adapter(model()).model)
    options = OPTIONS.replace(path="fast", audit=True, steps=1)
    (step,) = train_batch(policy, make_optimizer(policy, options), batch(), options).steps
    assert step.audit is not None
    assert step.audit.gradient > 3e-4
    assert step.audit.tokens > 1e-3


class Cramped(LoraPolicy):
    """Memory for so many tokens with gradient, as a small GPU has it."""

    most = 30

    def hidden(
        self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False
    ) -> Tensor:
        if adapter and len(batch.ids_P) > self.most and not (checkpointing and len(batch.ends) == 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().hidden(batch, adapter=adapter, checkpointing=checkpointing, compiled=compiled)

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        if adapter and batch.ids_BN.numel() > self.most:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return super().logits(batch, adapter=adapter)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_out_of_memory_goes_on_with_less(path: str) -> None:
    options = OPTIONS.replace(path=path, max_grad_norm=1e6)
    whole, policy = Ran(options), Cramped(adapter(model()).model)
    result = train_batch(policy, make_optimizer(policy, options), batch(), options)
    same_metrics(result, whole.result)
    plans = [s.plan for s in result.steps]
    assert all(p is not None and p.micro_batches > 1 and p.micro_batch_tokens <= 64 for p in plans)
    assert plans[0] == plans[-1]


def test_out_of_memory_turns_to_checkpointing_before_it_gives_up() -> None:
    policy = Cramped(adapter(model()).model)
    policy.most = 10
    options = OPTIONS.replace(path="fast")
    (first, *_) = train_batch(policy, make_optimizer(policy, options), batch(), options).steps
    assert first.plan is not None
    assert first.plan.checkpointing
    with pytest.raises(RuntimeError, match="can't allocate"):
        train_batch(policy, make_optimizer(policy, options), batch(), options.replace(path="plain"))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(LoraPolicy):
        def head(self) -> Head:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    policy = Broken(adapter(model()).model)
    with pytest.raises(RuntimeError, match="mat1"):
        train_batch(policy, make_optimizer(policy, OPTIONS), batch(), OPTIONS)


def test_teacher_scored_ahead() -> None:
    """The same batch, and no teacher pass: a policy that cannot score its base any more does not mind."""

    class Mute(LoraPolicy):
        @contextmanager
        def _bare(self, deltas: Mapping[str, Any] | None = None) -> Iterator[None]:
            assert deltas is not None, "the base was scored"
            yield

    options = OPTIONS.replace(path="fast")
    whole, policy = Ran(options), adapter(model())
    targets = teacher_targets(policy, batch(), options)
    assert policy.obstacle() == ""
    mute = Mute(policy.model)
    mute.__dict__["_obstacle"] = policy.obstacle()
    same_metrics(
        train_batch(mute, make_optimizer(mute, options), batch(), options, targets=targets), whole.result, 1e-6
    )
    with pytest.raises(TargetError, match="targets for"):
        train_batch(policy, make_optimizer(policy, options), batch(), options, targets=targets[:-1])
    with pytest.raises(TargetError, match="another answer"):
        train_batch(policy, make_optimizer(policy, options), batch(), options, targets=targets[::-1])
    with pytest.raises(OptionError, match="teacher"):
        teacher_targets(policy, batch(), options.replace(teacher="live"))


@pytest.mark.parametrize("changes", [{}, {"support": "student", "alpha": 0.5}])
def test_nothing_as_wide_as_the_vocabulary_is_kept(changes: dict[str, Any]) -> None:
    """No tensor that autograd saves has the vocabulary as a side, and none is larger than a chunk's logits."""
    vocabulary, seen = 4099, []
    policy = adapter(model(vocabulary=vocabulary))
    options = OPTIONS.replace(path="fast", steps=1, chunk_tokens=4, **changes)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        train_batch(policy, make_optimizer(policy, options), batch(vocabulary=vocabulary), options)
    assert seen
    assert not [shape for shape in seen if vocabulary in shape and shape[0] != vocabulary]
