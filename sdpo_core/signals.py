"""Published signals that are policy-gradient losses on sampled tokens rather than divergences.

Shapes: (T,) or (B, T) log-probs of the response's tokens. Each function restates one published loss, trap included.
`PolicyGradient` names their parts apart, so that the training loop can combine them (`policy_gradient_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdpo_core.aggregation import aggregate


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO per token: -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logp - old), gradient through r."""
    ratio = (logp - old_logp.detach()).exp()
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def combined_advantage(
    teacher_logp: Tensor, old_logp: Tensor, reward_advantage: Tensor, *, distill_weight: float, reward_weight: float
) -> Tensor:
    """distill * (teacher - old) + reward * A: token-level distillation beside a reward. Source: OpenClaw-RL combine."""
    return distill_weight * (teacher_logp - old_logp) + reward_weight * reward_advantage


def hindsight_loss(logp_BT: Tensor, hindsight_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """-A log pi(y|x), A = stopgrad(log pi(y|x,o) - log pi(y|x)); row means, then their mean. Not centred, no ratio.

    Source: user_interactions, offline trainer. `hindsight_logp_BT` is the same model told the user's follow-up.
    """
    advantage_BT = (hindsight_logp_BT - logp_BT).detach()
    return aggregate(-advantage_BT * logp_BT, mask_BT, "row-mean-token-mean")


def centred(advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Minus each row's mean over the mask; zero outside it."""
    on_BT = mask_BT.to(advantage_BT.dtype)
    mean_B1 = (advantage_BT * on_BT).sum(-1, keepdim=True) / on_BT.sum(-1, keepdim=True).clamp(min=1.0)
    return (advantage_BT - mean_B1) * on_BT


def centred_hindsight_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The same signal online: centred on each row's mean over the mask, PPO-clipped. Source: user_interactions."""
    losses_BT = clipped_policy_loss(logp_BT, old_logp_BT, centred(advantage_BT, mask_BT), clip_low, clip_high)
    return aggregate(losses_BT, mask_BT, "row-mean-token-mean")


@dataclass(frozen=True)
class GainedAdvantage:
    """Advantages of one sample and the gain that was applied."""

    advantages: Tensor
    gain: float


def gain_of(gap_T: Tensor, target: float, max_gain: float) -> float:
    """clamp(target / mean|gap|, 1, max_gain), 1 for a gap of zero: small gaps are amplified, large ones left."""
    size = float(gap_T.abs().mean()) if gap_T.numel() else 0.0
    return min(max(target / size, 1.0), max_gain) if size > 0.0 else 1.0


def gained_advantage(
    student_logp: Tensor, teacher_logp: Tensor, kl_coef: float, *, target: float = 0.03, max_gain: float = 4.0
) -> GainedAdvantage:
    """kl_coef * g * (teacher - student), g from `gain_of` per sample, (T,).

    Source: CLaaS's hosted engine, where alpha doubles as `kl_coef`.
    """
    gap = teacher_logp - student_logp
    gain = gain_of(gap, target, max_gain)
    return GainedAdvantage(kl_coef * gain * gap, gain)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """How teacher and reward become an advantage for the sampled tokens, and how the ratio enters. In this order:

    gap = teacher - reference; times the gain; `distill_weight` gap + `reward_weight` reward; centred; then
    -min(r A, clip(r) A) with r = exp(student - behaviour), gradient through r.
    """

    reference: Literal["student", "behaviour"] = "student"
    """What the teacher is compared with: the student now, or the log-probs at rollout time."""
    gain_target: float | None = None
    """Amplify small gaps up to this mean size, in nats (`gain_of`); None = no gain."""
    max_gain: float = 4.0
    distill_weight: float = 1.0
    reward_weight: float = 0.0
    """Weight of `Sample.reward_advantage`."""
    centre: bool = False
    """Subtract each answer's mean advantage."""
    clip_low: float | None = None
    clip_high: float | None = None
    """PPO's clip of r to [1 - low, 1 + high]; None = none."""


def advantages_of(
    logp_BT: Tensor,
    teacher_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    rule: PolicyGradient,
    rewards_B: Tensor | None = None,
) -> Tensor:
    """Advantage of each token (B, T), detached. A row must be a whole answer: gain and centre are means over it.

    `rewards_B`: one reward advantage per row.
    """
    on_BT, logp_BT, teacher_BT = mask_BT.bool(), logp_BT.detach(), teacher_BT.detach()
    reference_BT = logp_BT if rule.reference == "student" else behaviour_BT.detach()
    if rule.gain_target is not None:
        gaps = (teacher_BT - reference_BT).unbind(0)
        gains = [gain_of(g_T[on_T], rule.gain_target, rule.max_gain) for g_T, on_T in zip(gaps, on_BT, strict=True)]
        # The gain scales the gap: the same as a teacher that much further away.
        teacher_BT = reference_BT + logp_BT.new_tensor(gains).unsqueeze(-1) * (teacher_BT - reference_BT)
    reward_B1 = logp_BT.new_zeros(logp_BT.shape[0], 1) if rewards_B is None else rewards_B.detach().unsqueeze(-1)
    advantage_BT = combined_advantage(
        teacher_BT, reference_BT, reward_B1, distill_weight=rule.distill_weight, reward_weight=rule.reward_weight
    )
    return centred(advantage_BT, on_BT) if rule.centre else advantage_BT


def advantage_loss(logp: Tensor, behaviour: Tensor, advantage: Tensor, rule: PolicyGradient) -> Tensor:
    """Per-token loss of `rule` under given advantages, of any one shape; gradient into `logp` only."""
    if rule.clip_low is None or rule.clip_high is None:
        return -((logp - behaviour.detach()).exp() * advantage)
    return clipped_policy_loss(logp, behaviour, advantage, rule.clip_low, rule.clip_high)


def policy_gradient_loss(
    logp_BT: Tensor,
    teacher_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    rule: PolicyGradient,
    rewards_B: Tensor | None = None,
) -> Tensor:
    """`advantage_loss` under `advantages_of`, (B, T)."""
    advantage_BT = advantages_of(logp_BT, teacher_BT, behaviour_BT, mask_BT, rule, rewards_B)
    return advantage_loss(logp_BT, behaviour_BT, advantage_BT, rule)


def shifted_for_next_token(values_T: Tensor, prompt_length: int) -> Tensor:
    """Response values placed in a (prompt + response - 1,) sequence of next-token targets, zeros over the prompt."""
    return torch.cat([values_T.new_zeros(prompt_length - 1), values_T])
