"""Published signals that are policy-gradient losses on sampled tokens rather than divergences.

Shapes: (T,) or (B, T) log-probs of the response's tokens. Each function restates one published loss, trap included;
the product's own loss is in sdpo_core.terms.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def centred_hindsight_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The same signal online: centred on each row's mean over the mask, PPO-clipped. Source: user_interactions."""
    on_BT = mask_BT.to(advantage_BT.dtype)
    mean_B1 = (advantage_BT * on_BT).sum(-1, keepdim=True) / on_BT.sum(-1, keepdim=True).clamp(min=1.0)
    centred_BT = (advantage_BT - mean_B1) * on_BT
    losses_BT = clipped_policy_loss(logp_BT, old_logp_BT, centred_BT, clip_low, clip_high)
    return aggregate(losses_BT, mask_BT, "row-mean-token-mean")


@dataclass(frozen=True)
class GainedAdvantage:
    """Advantages of one sample and the gain that was applied."""

    advantages: Tensor
    gain: float


def gained_advantage(
    student_logp: Tensor, teacher_logp: Tensor, kl_coef: float, *, target: float = 0.03, max_gain: float = 4.0
) -> GainedAdvantage:
    """kl_coef * g * (teacher - student), g = clamp(target / mean|teacher - student|, 1, max): small gaps are amplified.

    Per sample, (T,). Source: CLaaS's hosted engine, where alpha doubles as `kl_coef`.
    """
    gap = teacher_logp - student_logp
    size = float(gap.abs().mean()) if gap.numel() else 0.0
    gain = min(max(target / size, 1.0), max_gain) if size > 0.0 else 1.0
    return GainedAdvantage(kl_coef * gain * gap, gain)


def shifted_for_next_token(values_T: Tensor, prompt_length: int) -> Tensor:
    """Response values placed in a (prompt + response - 1,) sequence of next-token targets, zeros over the prompt."""
    return torch.cat([values_T.new_zeros(prompt_length - 1), values_T])
