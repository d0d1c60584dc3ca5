"""What a batch reports: per step, per sample, and warnings with stable codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sdpo_core.samples import Sample
from sdpo_core.terms import TokenTerms

StopReason = Literal["steps", "gap_closed", "cancelled", "nothing_to_teach"]
Behaviour = Literal["engine", "recomputed"]
Outcome = Literal["updated", "gap_closed", "non_finite"]
WarningCode = Literal[
    "stale_metrics", "base_not_bare", "base_changed", "non_finite_step", "teacher_truncated", "risky_option"
]  # fmt: skip


@dataclass(frozen=True)
class BatchWarning:
    """Something that a healthy run never shows, or a known risk of its options (`risky_option`). The code is stable;
    the words may change."""

    code: WarningCode
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class Audit:
    """Largest differences between the path that was used and the plain one, over the micro-batches of a step."""

    loss: float
    """Of a micro-batch, absolute."""
    tokens: float
    """Of any value of any token (divergence, log-prob, ratio, entropy, ...), absolute."""
    gradient: float
    """Norm of the difference over the norm, per micro-batch."""
    teacher: float
    """Of the teacher's kept log-probs, absolute."""


@dataclass(frozen=True)
class StepPlan:
    """How much the step did at a time; smaller than asked for once memory has run out."""

    micro_batch_tokens: int
    chunk_tokens: int | None
    checkpointing: bool
    micro_batches: int
    compiled: bool = False
    """Whether the decoder layers of the step's own passes ran through torch.compile."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw, measured before its update. Means are weighted as the loss weights its tokens."""

    step: int
    """From 1."""
    loss: float
    distill_loss: float
    anchor_loss: float
    """k3 to the base, unweighted by `base_kl_weight`; nan when the base was not scored."""
    previous_anchor_loss: float
    """k3 to the version the batch started from, unweighted; nan when it was not scored."""
    gap: float
    """Teacher-student distance, nats per response token, plain token mean; the same measure whatever is trained
    (`divergence.GAP`)."""
    base_kl: float
    """KL(student || base), nats per response token (TokenTerms.base_kl); nan when the base was not scored."""
    peak_gap: float
    """Largest token's distance in each answer, mean over answers: a wish about one spot is not diluted by length."""
    mean_ratio: float
    max_ratio: float
    """Largest ratio before the clip."""
    clip_fraction: float
    entropy: float
    """Of the student, nats per response token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    response_tokens: int
    seconds: float
    outcome: Outcome
    """What became of the step: weights moved, the gap was already closed, or the gradient was not finite."""
    path: Literal["plain", "fast"] = "plain"
    fallback_reason: str = ""
    """Why it was not computed as the options ask: on the plain path, or without compiling the layers."""
    plan: StepPlan | None = None
    audit: Audit | None = None
    teacher_written: int = 0
    """Answers of the batch that the teacher wrote."""


@dataclass(frozen=True)
class SampleOutcome:
    taught: bool
    behaviour: Behaviour
    """Where the behaviour log-probs came from; `recomputed` = under the weights the batch started from."""
    reason: Literal["", "no_feedback", "empty_response"] = ""
    """Why the sample taught nothing."""


@dataclass(frozen=True)
class BatchResult:
    steps: tuple[StepMetrics, ...]
    samples: tuple[SampleOutcome, ...]
    stop_reason: StopReason
    warnings: tuple[BatchWarning, ...] = ()

    @property
    def updates(self) -> int:
        """Optimizer steps that moved the weights."""
        return sum(s.outcome == "updated" for s in self.steps)

    @property
    def skipped_non_finite(self) -> int:
        return sum(s.outcome == "non_finite" for s in self.steps)

    @property
    def masked_samples(self) -> int:
        return sum(not s.taught for s in self.samples)


def cautioned(cautions: Sequence[str]) -> tuple[BatchWarning, ...]:
    """What is known to be risky of the options (`Options.cautions`), as warnings of the batch."""
    return tuple(BatchWarning("risky_option", said) for said in cautions)


def sample_outcome(sample: Sample) -> SampleOutcome:
    behaviour: Behaviour = "recomputed" if sample.behaviour_logprobs is None else "engine"
    if not sample.taught:
        return SampleOutcome(False, behaviour, "no_feedback")
    if not sample.response_ids:
        return SampleOutcome(False, behaviour, "empty_response")
    return SampleOutcome(True, behaviour)


@dataclass
class Sums:
    """Running sums over the micro-batches of one step, in float64."""

    distill: float = 0.0
    anchor: float = 0.0
    previous_anchor: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    weight: float = 0.0
    gap: float = 0.0
    peak_gap: float = 0.0
    base_kl: float = 0.0
    entropy: float = 0.0
    max_ratio: float = 0.0

    def add(self, terms: TokenTerms, mask_BT: Tensor, weights_B: Tensor, clip: float | None) -> None:
        def weighted(x_BT: Tensor) -> float:
            return float((x_BT.detach().double().sum(-1) * weights_B.double()).sum())

        self.distill += weighted(terms.distill)
        self.anchor += weighted(terms.anchor)
        self.previous_anchor += weighted(terms.previous_anchor)
        self.ratio += weighted(terms.ratio)
        self.weight += weighted(mask_BT)
        if clip is not None:
            self.clipped += weighted((terms.ratio >= clip) & mask_BT)
        self.gap += float(terms.gap.double().sum())
        self.base_kl += float(terms.base_kl.double().sum())
        self.peak_gap += float(terms.gap.amax(-1).double().sum())
        self.entropy += float(terms.entropy.double().sum())
        self.max_ratio = max(self.max_ratio, float(terms.raw_ratio.max()))


@dataclass
class Watch:
    """Looks at a run from outside and notes what a healthy one never shows."""

    trained_before: bool
    """Whether the optimizer had stepped before this batch, so that the adapter is no longer the base model."""
    warnings: list[BatchWarning] = field(default_factory=list)

    def warn(self, code: WarningCode, message: str) -> None:
        self.warnings.append(BatchWarning(code, message))

    def step(self, metrics: StepMetrics, last: StepMetrics | None) -> None:
        if metrics.outcome == "non_finite":
            self.warn("non_finite_step", f"step {metrics.step} was skipped: its gradient or gap is not finite")
        if last is not None and last.outcome == "updated":
            self.trained_before = True
            self._stale(metrics, last)
        self._base_is_bare(metrics)

    def _stale(self, metrics: StepMetrics, last: StepMetrics) -> None:
        """A loss computed from stale state: the weights moved and nothing else did."""
        if metrics.grad_norm == 0.0:
            return
        if (metrics.loss, metrics.grad_norm, metrics.entropy) == (last.loss, last.grad_norm, last.entropy):
            self.warn(
                "stale_metrics",
                f"steps {last.step} and {metrics.step} have bit-identical loss, gradient norm and entropy although the "
                "weights were updated between them",
            )

    def _base_is_bare(self, metrics: StepMetrics) -> None:
        """A distance of exactly zero from a trained adapter to the base: the base was scored with the adapter on."""
        if self.trained_before and metrics.base_kl == 0.0 and not math.isnan(metrics.anchor_loss):
            self.warn(
                "base_not_bare",
                f"step {metrics.step}: the distance to the base is exactly 0 although the adapter has been trained; "
                "the base, and with it the teacher, was scored with the adapter on, or no update ever took effect",
            )
