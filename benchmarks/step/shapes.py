"""Models and batches to measure on: random weights from a configuration, nothing is downloaded.

S, M and P are the shapes of reference/SPEED.md. P's head takes the share of all weights that an 8B model's does, M has
a real vocabulary on a small body. Everything that SPEED.md leaves open is settled here as Qwen3 has it: MLP three
times the hidden size, four query heads per key head, a head size of 64, an untied head. The teacher's prompt is half as
long again as the student's, as in its figures for the H200.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from sdpo_core import (
    BatchResult,
    LoraPolicy,
    LoraSpec,
    Options,
    Sample,
    TeacherTarget,
    attach_lora,
    make_optimizer,
    train_batch,
)
from sdpo_core.scoring import Scorer

Targets = Sequence[TeacherTarget] | None
RANK = 32
SEED = 20
HEAD_SCALE = 10.0


@dataclass(frozen=True)
class Shape:
    """A model's sizes and a batch's: `rows` answers of `response` tokens behind `prompt` tokens."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    rows: int
    prompt: int
    response: int
    intermediate: int = 0
    """0 = three times `hidden`."""
    head_size: int = 64
    kv_heads: int = 0
    """0 = a quarter of the query heads, one at least."""

    @property
    def teacher_prompt(self) -> int:
        return self.prompt * 3 // 2

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or 3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or max(1, self.heads // 4),
            head_dim=self.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )

    def scaled(self, **changes: int) -> Shape:
        return replace(self, **changes)


S = Shape("S", hidden=256, layers=6, vocabulary=32_000, rows=8, prompt=64, response=64)
M = Shape("M", hidden=512, layers=8, vocabulary=151_936, rows=4, prompt=64, response=64)
P = Shape("P", hidden=512, layers=8, vocabulary=4_096, rows=4, prompt=128, response=128)
TINY = Shape("tiny", hidden=64, layers=2, vocabulary=512, rows=4, prompt=12, response=20, head_size=16)
QWEN3_8B = Shape(
    "Qwen3-8B", hidden=4096, layers=36, vocabulary=151_936, rows=8, prompt=512, response=512, intermediate=12_288,
    head_size=128, kv_heads=8,
)  # fmt: skip
SHAPES = {shape.name: shape for shape in (S, M, P, TINY, QWEN3_8B)}

OPTIONS = Options(
    alpha=0.5, support="teacher", top_k=100, outside="renormalise", is_clip=5.0, refresh=True, stop_gap=0.0,
    measure_base_kl=False, max_grad_norm=1e6, learning_rate=1e-4,
)  # fmt: skip
"""SPEED.md's loss: K=100, alpha .5, clip 5, no base KL. Gradients are not clipped, so that they can be compared."""


@dataclass(frozen=True)
class Case:
    """A model with an adapter, a batch for it, and the adapter's weights to start every run from."""

    shape: Shape
    policy: LoraPolicy
    samples: tuple[Sample, ...]
    start: tuple[Tensor, ...]

    @torch.no_grad()
    def reset(self) -> None:
        """The adapter as at the start, no gradients."""
        for (_, parameter), value in zip(self.policy.trainable(), self.start, strict=True):
            parameter.copy_(value)
            parameter.grad = None

    def train(self, options: Options, targets: Targets = None) -> BatchResult:
        """The batch, with a new optimizer; layers were compiled if and only if the options say so."""
        result = train_batch(
            self.policy, make_optimizer(self.policy, options), self.samples, options, targets=targets
        )  # fmt: skip
        for step in result.steps:
            assert step.plan is not None
            assert step.plan.compiled == options.compile_layers, step.fallback_reason
        return result

    def gradient(self) -> Tensor:
        """The adapter's gradients as one vector, in float64: those of the last step."""
        parts = [p.grad.flatten().double() for _, p in self.policy.trainable() if p.grad is not None]
        return torch.cat(parts) if parts else torch.zeros(0)


def build(shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """A model of this shape with an adapter that has been trained a little, and a batch that its student wrote."""
    torch.manual_seed(SEED)
    with torch.device(device):
        base = Qwen3ForCausalLM._from_config(shape.config(), dtype=dtype).eval()
    with torch.no_grad():
        # Logits that spread as a trained model's do. At their initial width the 100th and the 101st of a row are often
        # equal but for rounding: two right ways to compute them then keep different tokens.
        base.lm_head.weight.mul_(HEAD_SCALE)
    policy = attach_lora(base, LoraSpec(rank=RANK, alpha=RANK, seed=SEED))
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:  # a fresh B is zero, and A's gradient with it
                parameter.normal_(0.0, 0.01)
    start = tuple(p.detach().clone() for _, p in policy.trainable())
    return Case(shape, policy, tuple(_samples(shape, policy)), start)


def _samples(shape: Shape, policy: LoraPolicy) -> list[Sample]:
    """Random text. Recorded log-probs are the student's own with noise, so that ratios differ and some are clipped."""
    draw = torch.Generator().manual_seed(SEED)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(shape.vocabulary, (length,), generator=draw).tolist())

    bare = [Sample(ids(shape.prompt), ids(shape.response), ids(shape.teacher_prompt)) for _ in range(shape.rows)]
    scorer = Scorer(policy, OPTIONS.replace(micro_batch_tokens=1))  # one answer at a time
    own = [scorer.start([sample])[0].logp.cpu() for sample in bare]
    return [
        replace(sample, behaviour_logprobs=tuple((logp_T - torch.randn(logp_T.shape, generator=draw)).tolist()))
        for sample, logp_T in zip(bare, own, strict=True)
    ]
