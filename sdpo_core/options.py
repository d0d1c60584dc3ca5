"""Every choice of the algorithm as one frozen record of orthogonal options; presets are in sdpo_core.presets.

Bounds are checked when the record is made. Combinations that train nothing or are known to collapse are refused with
the option's name and the reason; `Options.cautions` names those that are merely risky.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sdpo_core.aggregation import Aggregation
from sdpo_core.divergence import DivergenceSpec, Outside, Support
from sdpo_core.errors import OptionError
from sdpo_core.option_checks import PathChoice, RolloutCorrection, TeacherKind, check
from sdpo_core.signals import PolicyGradient

_NEAR_END = 0.01
"""A mixture is at most the entropy of (alpha, 1 - alpha): .056 nats here."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one batch. The defaults are what our own measurements favour (docs/algorithm.md)."""

    alpha: float = 0.0
    """Weight of the teacher in the mixture: 0 forward KL(T||S), 1 reverse KL(S||T), between: generalised JSD."""
    support: Support = "teacher"
    """Tokens compared: the teacher's top K, the student's top K, the full vocabulary, the sampled token."""
    top_k: int | None = 100
    """K of the top-K supports. With `sampled`: None = exact, K = `sampled_floor` outside the teacher's top K."""
    outside: Outside = "tail"
    """Mass outside the top K: one extra bucket, or both sides renormalised."""
    sampled_floor: float = -20.0
    """Teacher log-prob given to a sampled token outside the teacher's top K (support `sampled` with a K only)."""

    is_clip: float | None = 2.0
    """Upper clip of the importance ratio; None = no ratio."""
    refresh: bool = True
    """After each step the new weights count as the behaviour policy, so the ratio is 1 from step 2 on. False: the
    ratio stays relative to the rollout."""
    rollout_correction: RolloutCorrection = "none"
    """Weights for text whose recorded log-probs come from another engine: min(exp(trainer - engine), threshold) under
    the starting weights, per token or per answer. The ratio is then relative to the trainer's own log-probs."""
    rollout_threshold: float = 2.0
    rollout_normalise: bool = False
    """Divide those weights by their mean over the batch."""
    teacher: TeacherKind = "base"
    """Who is told the feedback: the bare base model, the version that the batch started from, the student as it is at
    each step, or a moving average of versions (its state is `train_batch`'s argument `ema`)."""
    teacher_mix: float = 0.0
    """Trust region: share of the student, as at the start of the batch, in the teacher's raw logits. 0 = none,
    1 = the starting version."""
    teacher_rate: float = 0.05
    """Step of the moving average, once per batch after an update (teacher `ema`)."""
    teacher_rank: int = 64
    """Most rank kept of the moving average per layer (sdpo_core.ema)."""
    base_kl_weight: float = 0.0
    """Weight of the k3 anchor to the base model on the plain prompt."""
    previous_kl_weight: float = 0.0
    """Weight of the k3 anchor to the version that the batch started from, on the plain prompt."""
    top_entropy: float = 1.0
    """Distil only this share of the batch's response tokens, those where the starting student's entropy is highest.
    The others stay in the denominators and under the anchors (as in TRL's GRPO)."""
    skip_tokens: int = 0
    """The first so many response tokens of each answer teach nothing and count nowhere, as if they stood in the prompt
    (TRL's `num_loss_tokens_to_skip`). An answer that has no more is a row without tokens."""
    policy_gradient: PolicyGradient | None = None
    """An advantage with a ratio that carries gradient, in place of the sampled-token loss."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number (sdpo_core.aggregation)."""

    steps: int = 8
    """Optimizer steps per batch at most, 1 to 64."""
    stop_gap: float = 0.1
    """Stop before an update once the teacher-student gap is closed: below this many nats at each answer's worst token,
    mean over answers (`StepMetrics.peak_gap`). Nats of the forward KL whatever is trained, so a value means the same
    beside any alpha and support. 0 = never. Praise stays below it, so it moves nothing."""
    stop_gap_ratio: float = 0.0
    """Stop as well once the same gap is below this share of what it was at step 1. 0 = never."""

    path: PathChoice = "auto"
    """How it is computed, not what: `plain` (padded rows, whole logits), `fast` (packed rows, logits in chunks), `auto`
    the same as `fast`. Where fast cannot be, plain is taken and `StepMetrics.fallback_reason` says why."""
    audit: bool = False
    """Run both paths on every micro-batch and report their largest differences (`StepMetrics.audit`)."""
    micro_batch_tokens: int = 8192
    """Student tokens per forward pass, padding included (rows x longest row) where there is any; one sample at least.
    After a lack of memory the batch goes on with half as many."""
    chunk_tokens: int | None = None
    """Response tokens whose logits exist at a time (fast path); None = by the size of the vocabulary."""
    checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass (fast path)."""
    compile_layers: bool = False
    """Run the decoder layers through torch.compile (fast path): for a GPU that will train much, since the first batch
    takes a minute or so longer. Rounding differs from layers that run as they are, as a moving average's teacher does.
    Where compiling fails, the batch goes on without, and `StepMetrics.fallback_reason` says why."""

    learning_rate: float = 1e-4
    """For models of billions of parameters; the demonstration model (a million) takes 7e-4."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled to this global norm at most; the reported norm is the one before."""
    measure_base_kl: bool = False
    """Report the distance to the base even when `base_kl_weight` is 0, for one more forward pass per batch. Without
    either, the metric is nan and nobody scores the base on the plain prompts."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def divergence(self) -> DivergenceSpec:
        return DivergenceSpec(self.alpha, self.support, self.top_k, self.outside, self.sampled_floor)

    @property
    def needs_base(self) -> bool:
        """Whether the base model must score the plain prompts."""
        return self.base_kl_weight > 0 or self.measure_base_kl

    @property
    def needs_start(self) -> bool:
        """Whether the starting student must score the plain prompts before the first step."""
        return self.previous_kl_weight > 0 or self.top_entropy < 1.0 or self.rollout_correction != "none"

    @property
    def cautions(self) -> tuple[str, ...]:
        """Known risks of these settings, in words; empty for the defaults. `BatchResult.warnings` has them as well."""
        found = []
        if self.teacher_mix > 0.5:
            found.append("teacher_mix: a teacher that follows the student can drift with it until content collapses")
        if self.teacher in ("live", "previous"):
            found.append(f"teacher: '{self.teacher}' follows the student; nothing holds it to the base: it can drift")
        if self.teacher == "ema" and self.teacher_rate > 0.5:
            found.append("teacher_rate: a fast moving average is nearly the student and drifts with it")
        if self.teacher == "ema" and self.teacher_rate == 0:
            found.append("teacher_rate: at 0 the moving average never moves and stays as it was made")
        if 0 < self.alpha < _NEAR_END or 1 - _NEAR_END < self.alpha < 1:
            found.append(
                f"alpha: at {self.alpha:g} the mixture's value and gradient are nearly 0, and little is trained; the "
                "ends, 0 and 1, are formulas of their own"
            )
        if 0 < self.alpha < 1:
            found.append("alpha: a mixture has almost no gradient on tokens the student gives no probability")
        if self.support == "sampled":
            found.append("support: a sampled-token loss cannot raise tokens that the student never samples")
        return tuple(found)

    def replace(self, **changes: Any) -> Options:
        """A copy with some options changed, checked again. Raises OptionError, for an unknown name as well."""
        return self.from_dict({**vars(self), **changes})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `Options.from_dict` takes them back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Options from plain values. Raises OptionError that names what is unknown or of a wrong type."""
        if not isinstance(values, Mapping):
            raise OptionError("options", "must be a mapping of names to values")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise OptionError(name, "there is no such option")
        given = dict(values)
        if isinstance(given.get("betas"), list):
            given["betas"] = tuple(given["betas"])
        if isinstance(given.get("policy_gradient"), Mapping):
            given["policy_gradient"] = _policy_gradient(given["policy_gradient"])
        return cls(**given)


def _policy_gradient(values: Mapping[str, Any]) -> PolicyGradient:
    for name in values:
        if name not in {f.name for f in fields(PolicyGradient)}:
            raise OptionError(f"policy_gradient.{name}", "there is no such option")
    return PolicyGradient(**values)
