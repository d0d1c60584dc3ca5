"""Presets: published systems as choices of the same options, never as code of their own.

What belongs to a rollout or to the wording of a prompt is not an option: repeated feedback is `teacher_prompt`'s
`repetitions`, teacher-written answers are `sdpo_core.rollouts`, environment rewards are `Sample.reward_advantage`.
Line-by-line facts about the systems, with the places in their sources: docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdpo_core.options import Options
from sdpo_core.signals import PolicyGradient

_ADAMW: dict[str, Any] = {"stop_gap": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.01}
"""A fixed number of steps with PyTorch's AdamW, as all of them train."""


def claas(alpha: float = 0.5, **changes: Any) -> Options:
    """CLaaS (main): teacher's top 100 renormalised, ratio clipped at 5, frozen base, mean over samples of token means.

    alpha 1 is their sampled-token branch; alpha 0 is refused, their loss is identically zero there.
    """
    values: dict[str, Any] = {
        "alpha": alpha,
        "support": "sampled" if alpha == 1.0 else "teacher",
        "top_k": 100,
        "outside": "renormalise",
        "is_clip": 5.0,
        "refresh": True,
        "aggregation": "seq-mean-token-mean",
        "steps": 1,
        "learning_rate": 3e-5,
    }
    return Options(**{**_ADAMW, **values, **changes})


def lasgroup(alpha: float = 0.5, **changes: Any) -> Options:
    """lasgroup/SDPO (actor.yaml): student's top 100 with a tail bucket, clip 2, token mean, moving-average teacher.

    Their trust-region teacher: `lasgroup(teacher="base", teacher_mix=0.05)`.
    """
    values: dict[str, Any] = {
        "alpha": alpha,
        "support": "student",
        "top_k": 100,
        "outside": "tail",
        "is_clip": 2.0,
        "refresh": True,
        "teacher": "ema",
        "teacher_rate": 0.05,
        "steps": 1,
        "learning_rate": 1e-5,
    }
    return Options(**{**_ADAMW, **values, **changes})


def trl(**changes: Any) -> Options:
    """TRL's SDPO: sampled token, clip 2, row means over ALL rows (untaught ones dilute), moving-average teacher.

    Their average moves every optimizer step and averages LoRA factors; here once per batch, of the merged delta.
    """
    values: dict[str, Any] = {
        "alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": 2.0, "aggregation": "row-mean-token-mean",
        "teacher": "ema", "teacher_rate": 0.05, "steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


def sdft(**changes: Any) -> Options:
    """TRL's SDFT: student's top 100 renormalised, alpha .5, frozen teacher (or `teacher="ema"` / `"live"`).

    With answers that the teacher wrote, `learnt_from(..., "teacher")`: the ratio is 1, as theirs is off.
    """
    values: dict[str, Any] = {
        "alpha": 0.5, "support": "student", "top_k": 100, "outside": "renormalise", "is_clip": 2.0,
        "aggregation": "row-mean-token-mean", "steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


def user_interactions_offline(**changes: Any) -> Options:
    """user_interactions offline: the sampled reverse KL with a live teacher, no ratio, row means."""
    values: dict[str, Any] = {
        "alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": None, "aggregation": "row-mean-token-mean",
        "teacher": "live", "steps": 1, "learning_rate": 2e-6,
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


def user_interactions_online(**changes: Any) -> Options:
    """user_interactions online: the same signal centred per answer, PPO-clipped at .2, gradient through the ratio."""
    rule = PolicyGradient(centre=True, clip_low=0.2, clip_high=0.2)
    values: dict[str, Any] = {"policy_gradient": rule, "learning_rate": 5e-6}
    return user_interactions_offline(**{**values, **changes})


def openclaw(**changes: Any) -> Options:
    """OpenClaw-RL's top-K distillation: reverse KL on the teacher's top 50 and a tail, no ratio, mean of answers."""
    values: dict[str, Any] = {
        "alpha": 1.0, "support": "teacher", "top_k": 50, "is_clip": None, "aggregation": "seq-mean-token-mean",
        "steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


def openclaw_combined(distill_weight: float = 1.0, reward_weight: float = 1.0, **changes: Any) -> Options:
    """OpenClaw-RL's combination: distill * (teacher - behaviour) + reward * A, PPO-clipped at .2 low and .28 high."""
    rule = PolicyGradient(
        reference="behaviour", distill_weight=distill_weight, reward_weight=reward_weight, clip_low=0.2, clip_high=0.28
    )
    values: dict[str, Any] = {
        "alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": None, "policy_gradient": rule,
        "aggregation": "seq-mean-token-mean", "steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


def claas_hosted(kl_coef: float = 0.5, **changes: Any) -> Options:
    """CLaaS on its hosted engine: adaptive KL, small gaps amplified up to 4 times, plain importance ratio."""
    rule = PolicyGradient(reference="behaviour", gain_target=0.03, max_gain=4.0, distill_weight=kl_coef)
    values: dict[str, Any] = {
        "alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": None, "policy_gradient": rule, "steps": 1,
        "aggregation": "seq-mean-token-sum", "learning_rate": 3e-5, "betas": (0.9, 0.95),
    }  # fmt: skip
    return Options(**{**_ADAMW, **values, **changes})


PRESETS: Mapping[str, Options] = MappingProxyType(
    {
        "default": Options(),
        "claas": claas(),
        "claas_hosted": claas_hosted(),
        "lasgroup": lasgroup(),
        "openclaw": openclaw(),
        "openclaw_combined": openclaw_combined(),
        "sdft": sdft(),
        "trl": trl(),
        "user_interactions_offline": user_interactions_offline(),
        "user_interactions_online": user_interactions_online(),
    }
)
