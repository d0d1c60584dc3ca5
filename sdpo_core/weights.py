"""Weights on per-token losses: importance ratio, rollout correction, anchors, masks.

Shapes: all (..., T) or (B, T) float tensors of log-probs of the response's own tokens; masks hold 0 and 1.
Every weight is detached: it scales a gradient and has none of its own (the k3 anchor, a loss, is the exception).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are cut to +-20 before exponentiation: e^20 is finite and absurd, which is enough."""


def bounded_log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator - denominator in float32, cut to +-20."""
    return (numerator.float() - denominator.float()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def importance_ratio(student_logp: Tensor, behaviour_logp: Tensor, clip: float | None) -> Tensor:
    """min(exp(student - behaviour), clip), detached. `clip` None is no ratio at all: ones.

    One-sided: a clipped token keeps `clip` times its gradient (unlike PPO, where it loses it), and small ratios are
    left as they are.
    """
    if clip is None:
        return torch.ones_like(student_logp, dtype=torch.float32)
    return bounded_log_ratio(student_logp.detach(), behaviour_logp.detach()).exp().clamp(max=clip)


def k3(student_logp: Tensor, anchor_logp: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = student - anchor (+-20): >= 0, zero value and gradient where both agree.

    Gradient flows into the student; beyond +-20 it is flat. Source: CLaaS sdpo_loss.py.
    """
    d = bounded_log_ratio(student_logp, anchor_logp.detach())
    return torch.expm1(d) - d


def rollout_weights(
    log_ratio_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    threshold: float = 2.0,
    batch_normalise: bool = False,
) -> Tensor:
    """min(exp(log_ratio), threshold) for log_ratio = trainer - engine log-probs under the SAME weights, (B, T).

    `sequence` sums the logs over a row and gives the row one weight. Zero where the mask is 0; divided by its mean
    over the mask when `batch_normalise`. Source: verl rollout_corr_helper.py.
    """
    on = mask_BT.bool()
    log_BT = torch.where(on, log_ratio_BT.detach().float(), 0.0)
    if level == "sequence":
        log_BT = log_BT.sum(-1, keepdim=True).expand_as(log_BT)
    weights_BT = log_BT.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=threshold)
    weights_BT = torch.where(on, weights_BT, 0.0)
    if not batch_normalise:
        return weights_BT
    mean = weights_BT.sum() / on.sum().clamp(min=1)
    return weights_BT / mean.clamp(min=1e-8)


def top_entropy_mask(entropies_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """Keep the `quantile` share of valid tokens with the highest entropy, (B, T) of 0/1. Source: TRL GRPO."""
    on = mask_BT.bool()
    if not bool(on.any()):
        return torch.zeros_like(entropies_BT)
    threshold = torch.quantile(entropies_BT[on].float(), 1.0 - quantile)
    return ((entropies_BT >= threshold) & on).to(entropies_BT.dtype)
