"""What `Options` refuses: names, bounds, and combinations that train nothing or are known to collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from sdpo_core.aggregation import Aggregation
from sdpo_core.divergence import Outside, Support
from sdpo_core.errors import OptionError
from sdpo_core.given import shown
from sdpo_core.signals import PolicyGradient

if TYPE_CHECKING:
    from sdpo_core.options import Options

TeacherKind = Literal["base", "previous", "live", "ema"]
RolloutCorrection = Literal["none", "token", "sequence"]
PathChoice = Literal["auto", "plain", "fast"]


def check(o: Options) -> None:
    """Raises OptionError with the option's name and the reason."""
    _check_types(o)
    _check_names(o)
    _check_bounds(o)
    _check_combinations(o)


def _check_types(o: Options) -> None:
    _typed(o)
    rule: Any = o.policy_gradient
    if rule is None:
        return
    if not isinstance(rule, PolicyGradient):
        raise OptionError("policy_gradient", f"must be a PolicyGradient or None, not {shown(rule)}")
    _typed(rule, "policy_gradient.")


def _typed(record: Any, prefix: str = "") -> None:
    """Every field is of the plain type that it is annotated with; names are left to `_check_names`."""
    for field in fields(record):
        fits, what = _TYPES.get(str(field.type), (_anything, ""))
        if not fits(value := getattr(record, field.name)):
            raise OptionError(prefix + field.name, f"must be {what}, not {shown(value)}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _anything(_: Any) -> bool:
    return True


_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (_is_bool, "True or False"),
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "int | None": (lambda value: value is None or _is_whole(value), "a whole number or None"),
    "float | None": (lambda value: value is None or _is_number(value), "a number or None"),
    "tuple[float, float]": (_is_pair, "a pair of numbers"),
}
"""By annotation."""


def _check_names(o: Options) -> None:
    choices = (
        ("support", Support), ("outside", Outside), ("aggregation", Aggregation), ("teacher", TeacherKind),
        ("rollout_correction", RolloutCorrection), ("path", PathChoice),
    )  # fmt: skip
    for name, literal in choices:
        if not isinstance(value := getattr(o, name), str) or value not in get_args(literal):
            raise OptionError(name, f"must be one of {', '.join(get_args(literal))}, not {shown(value)}")


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
    _within("skip_tokens", o.skip_tokens, 0, 1 << 20)
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
    if o.chunk_tokens is not None:
        _within("chunk_tokens", o.chunk_tokens, 1, 1 << 24)
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
