"""Every choice of the algorithm as one frozen record of orthogonal options; presets are in sdpo_core.presets.

Bounds are checked when the record is made. Combinations that train nothing or are known to collapse are refused with
the option's name and the reason; `Options.cautions` names those that are merely risky.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from sdpo_core.aggregation import Aggregation
from sdpo_core.divergence import DivergenceSpec, Outside, Support
from sdpo_core.errors import OptionError
from sdpo_core.signals import PolicyGradient

TeacherKind = Literal["base", "previous", "live", "ema"]
RolloutCorrection = Literal["none", "token", "sequence"]


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
    policy_gradient: PolicyGradient | None = None
    """An advantage with a ratio that carries gradient, in place of the sampled-token loss."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number (sdpo_core.aggregation)."""

    steps: int = 4
    """Optimizer steps per batch at most, 1 to 64."""
    stop_gap: float = 0.1
    """Stop before an update once the teacher-student gap is closed: below this many nats at each answer's worst token,
    mean over answers (`StepMetrics.peak_gap`). 0 = never. Praise stays below it, so it moves nothing."""
    stop_gap_ratio: float = 0.0
    """Stop as well once the same gap is below this share of what it was at step 1. 0 = never."""
    micro_batch_tokens: int = 8192
    """Padded student tokens (rows x longest row) per forward pass; one sample at least."""

    learning_rate: float = 1e-4
    """For models of billions of parameters; the demonstration model (a million) takes 1.5e-3."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled to this global norm at most; the reported norm is the one before."""
    measure_base_kl: bool = True
    """Report the k3 distance to the base even when `base_kl_weight` is 0 (one extra forward pass per batch)."""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_bounds(self)
        _check_combinations(self)

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
        """Known risks of these settings, in words; empty for the presets."""
        found = []
        if self.teacher_mix > 0.5:
            found.append("teacher_mix: a teacher that follows the student can drift with it until content collapses")
        if self.teacher in ("live", "previous"):
            found.append(f"teacher: '{self.teacher}' follows the student; nothing holds it to the base: it can drift")
        if self.teacher == "ema" and self.teacher_rate > 0.5:
            found.append("teacher_rate: a fast moving average is nearly the student and drifts with it")
        if 0 < self.alpha < 1:
            found.append("alpha: a mixture has almost no gradient on tokens the student gives no probability")
        if self.support == "sampled":
            found.append("support: a sampled-token loss cannot raise tokens that the student never samples")
        return tuple(found)

    def replace(self, **changes: Any) -> Options:
        """A copy with some options changed, checked again."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `Options.from_dict` takes them back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Options from plain values; an unknown name is an error that names it."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise OptionError(name, "there is no such option")
        given = dict(values)
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        if isinstance(given.get("policy_gradient"), Mapping):
            given["policy_gradient"] = _policy_gradient(given["policy_gradient"])
        return cls(**given)


def _policy_gradient(values: Mapping[str, Any]) -> PolicyGradient:
    for name in values:
        if name not in {f.name for f in fields(PolicyGradient)}:
            raise OptionError(f"policy_gradient.{name}", "there is no such option")
    return PolicyGradient(**values)


def _check_names(o: Options) -> None:
    choices = (
        ("support", Support), ("outside", Outside), ("aggregation", Aggregation), ("teacher", TeacherKind),
        ("rollout_correction", RolloutCorrection),
    )  # fmt: skip
    for name, literal in choices:
        if getattr(o, name) not in get_args(literal):
            raise OptionError(name, f"must be one of {', '.join(get_args(literal))}")


def _check_bounds(o: Options) -> None:
    _within("alpha", o.alpha, 0.0, 1.0)
    _within("sampled_floor", o.sampled_floor, -100.0, 0.0)
    _within("teacher_mix", o.teacher_mix, 0.0, 1.0)
    _within("teacher_rate", o.teacher_rate, 0.0, 1.0)
    _within("teacher_rank", o.teacher_rank, 1, 1 << 14)
    _within("rollout_threshold", o.rollout_threshold, 1.0, 1e6)
    _within("base_kl_weight", o.base_kl_weight, 0.0, 1e3)
    _within("previous_kl_weight", o.previous_kl_weight, 0.0, 1e3)
    _within("top_entropy", o.top_entropy, 1e-3, 1.0, "a share of 0 trains nothing")
    _within("steps", o.steps, 1, 64)
    _within("stop_gap", o.stop_gap, 0.0, 1e3)
    _within("stop_gap_ratio", o.stop_gap_ratio, 0.0, 0.99)
    _within("micro_batch_tokens", o.micro_batch_tokens, 1, 1 << 24)
    _within("learning_rate", o.learning_rate, 1e-9, 1.0, "a rate of 0 trains nothing")
    _within("weight_decay", o.weight_decay, 0.0, 1.0)
    _within("max_grad_norm", o.max_grad_norm, 1e-6, 1e6)
    _within("eps", o.eps, 1e-16, 1.0)
    for beta in o.betas:
        _within("betas", beta, 0.0, 0.99999)
    if o.is_clip is not None:
        _within("is_clip", o.is_clip, 1.0, 1e6, "a clip below 1 scales down text that is on-policy")
    if o.top_k is not None:
        _within("top_k", o.top_k, 1, 1 << 20)


def _check_combinations(o: Options) -> None:
    if o.support in ("teacher", "student") and o.top_k is None:
        raise OptionError("top_k", f"support '{o.support}' needs a number of tokens")
    if o.support == "sampled" and o.alpha != 1.0:
        raise OptionError("alpha", "the sampled-token loss is an estimator of the reverse KL: alpha must be 1")
    if o.support in ("teacher", "student") and o.outside == "renormalise":
        if o.top_k == 1:
            raise OptionError("top_k", "trains nothing: one token renormalised has probability 1 on both sides")
        if o.support == "teacher" and o.alpha == 0.0:
            raise OptionError(
                "outside",
                "renormalised over the teacher's top K, alpha 0 is either identically zero (CLaaS's formula) or leaves "
                "the student's mass outside the top K free to grow; use outside='tail'",
            )
    if o.support == "student" and o.alpha == 0.0:
        raise OptionError(
            "support",
            "alpha 0 on the student's own top K collapses to empty answers: what the teacher wants is not in it; "
            "use support='teacher'",
        )
    _check_teacher(o)
    _check_policy_gradient(o)


def _check_teacher(o: Options) -> None:
    if o.teacher_mix > 0 and o.teacher in ("previous", "live"):
        raise OptionError("teacher_mix", f"has nothing to mix: teacher '{o.teacher}' is the student already")
    if o.previous_kl_weight > 0 and o.steps == 1:
        raise OptionError(
            "previous_kl_weight",
            "trains nothing: the only step starts at the previous version, where the anchor has no gradient",
        )


def _check_policy_gradient(o: Options) -> None:
    rule = o.policy_gradient
    if rule is None:
        return
    if o.support != "sampled":
        raise OptionError("policy_gradient", "an advantage is for the sampled token: use support='sampled'")
    if o.is_clip is not None:
        raise OptionError("is_clip", "the policy gradient has its own ratio: set is_clip to None")
    if rule.reference not in ("student", "behaviour"):
        raise OptionError("policy_gradient.reference", "must be one of student, behaviour")
    if (rule.clip_low is None) != (rule.clip_high is None):
        raise OptionError("policy_gradient.clip_low", "give both clips or neither")
    if rule.distill_weight == 0 and rule.reward_weight == 0:
        raise OptionError("policy_gradient.distill_weight", "trains nothing: both weights are 0")
    _within("policy_gradient.clip_low", rule.clip_low or 0.0, 0.0, 1.0)
    _within("policy_gradient.clip_high", rule.clip_high or 0.0, 0.0, 1e3)
    _within("policy_gradient.distill_weight", rule.distill_weight, 0.0, 1e3)
    _within("policy_gradient.reward_weight", rule.reward_weight, 0.0, 1e3)
    _within("policy_gradient.max_gain", rule.max_gain, 1.0, 1e3)
    _within("policy_gradient.gain_target", rule.gain_target or 0.0, 0.0, 1e3)


def _within(name: str, value: float, low: float, high: float, why: str = "") -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise OptionError(name, f"{value} is outside [{low:g}, {high:g}]" + (f"; {why}" if why else ""))
