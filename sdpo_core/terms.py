"""The per-token loss of a micro-batch: divergence times ratio, plus the anchor, with everything worth reporting.

Shape legend: B samples, T response tokens, V vocabulary. A pure function of tensors; golden vectors and the training
loop both come through here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.signals import PolicyGradient, policy_gradient_loss
from sdpo_core.weights import bounded_log_ratio, importance_ratio, k3

BASE_DISTANCE = DivergenceSpec(alpha=1.0, support="teacher", top_k=100, outside="tail")
"""How the reported distance to the base is measured; the base plays the teacher."""


@dataclass(frozen=True)
class TokenTerms:
    """All (B, T), exact zeros where the mask is off. Only `distill` and the anchors carry gradient."""

    distill: Tensor
    """Divergence after every per-token weight."""
    anchor: Tensor
    """k3 to the base, unweighted; zeros without base log-probs."""
    previous_anchor: Tensor
    """k3 to the version that the batch started from, unweighted; zeros without its log-probs."""
    gap: Tensor
    """Teacher-student distance before weights: the divergence itself, or for a sampled token k3 towards the teacher,
    since the sampled loss's value is no distance."""
    ratio: Tensor
    """Clipped importance ratio."""
    raw_ratio: Tensor
    """The same before the clip."""
    base_kl: Tensor
    """KL(student || base) over the base's top tokens and one tail bucket: exact up to what it merges in the tail, never
    above the full one. Unlike an estimate from the response token it stays meaningful for text that the student would
    not write any more. Zeros without a base target."""
    entropy: Tensor
    logp: Tensor
    """Student log-probs of the response tokens, detached."""


def token_terms(
    student_logits_BTV: Tensor,
    target: Target,
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    spec: DivergenceSpec,
    *,
    is_clip: float | None,
    behaviour_BT: Tensor | None = None,
    base_logp_BT: Tensor | None = None,
    base_target: Target | None = None,
    previous_logp_BT: Tensor | None = None,
    token_weights_BT: Tensor | None = None,
    policy_gradient: PolicyGradient | None = None,
    rewards_B: Tensor | None = None,
) -> TokenTerms:
    """Score one micro-batch. `behaviour_BT` None, or NaN at a token, means that the text counts as sampled from the
    student as it is now: the ratio is 1 there. `token_weights_BT` scales the distillation loss, not the anchors.
    `policy_gradient` replaces the sampled-token loss and its ratio.

    Masked positions may hold anything, NaN included: they give exactly zero value and zero gradient.
    """
    on_BT = mask_BT.bool()
    on_BT1 = on_BT.unsqueeze(-1)
    logits = torch.where(on_BT1, student_logits_BTV, torch.zeros_like(student_logits_BTV))
    student = dv.scores(logits)
    target = _clean(target, on_BT)
    student_BT = dv.token_log_probs(student.logp, response_ids_BT)
    logp_BT = student_BT.detach()
    behaviour = logp_BT
    if behaviour_BT is not None:
        behaviour = torch.where(on_BT & ~behaviour_BT.isnan(), behaviour_BT.detach().float(), logp_BT)
    ratio = importance_ratio(logp_BT, behaviour, is_clip)
    raw_divergence = dv.token_divergence(student, target, response_ids_BT, spec)
    distill = raw_divergence * ratio
    if policy_gradient is not None:
        distill = policy_gradient_loss(student_BT, target.logp, behaviour, on_BT, policy_gradient, rewards_B)
    if token_weights_BT is not None:
        distill = distill * token_weights_BT.detach().float()
    gap = k3(target.logp, logp_BT) if spec.support == "sampled" else raw_divergence.detach()

    def keep(x_BT: Tensor) -> Tensor:
        return torch.where(on_BT, x_BT, torch.zeros_like(x_BT))

    def anchored(anchor_BT: Tensor | None) -> Tensor:
        if anchor_BT is None:
            return torch.zeros_like(logp_BT)
        return keep(k3(student_BT, torch.where(on_BT, anchor_BT.detach().float(), logp_BT)))

    return TokenTerms(
        distill=keep(distill),
        anchor=anchored(base_logp_BT),
        previous_anchor=anchored(previous_logp_BT),
        gap=keep(gap),
        ratio=keep(ratio),
        raw_ratio=keep(bounded_log_ratio(logp_BT, behaviour).exp()),
        base_kl=keep(_base_distance(student, base_target, response_ids_BT, on_BT)),
        entropy=keep(dv.entropy(student.logp.detach())),
        logp=keep(logp_BT),
    )


@torch.no_grad()
def _base_distance(student: dv.Scores, base: Target | None, response_ids_BT: Tensor, on_BT: Tensor) -> Tensor:
    if base is None:
        return torch.zeros_like(on_BT, dtype=torch.float32)
    return dv.token_divergence(student, _clean(base, on_BT), response_ids_BT, BASE_DISTANCE)


def _clean(target: Target, on_BT: Tensor) -> Target:
    """Detach the teacher, put 0 where the mask is off, and replace -inf by the floor."""

    def tidy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        on = on_BT.unsqueeze(-1) if x.dim() > on_BT.dim() else on_BT
        return torch.where(on, x.detach().float(), 0.0).clamp(min=dv.LOGP_FLOOR)

    logp = tidy(target.logp)
    assert logp is not None  # noqa: S101 - narrows the type; a target always has log-probs
    return Target(logp, target.index, tidy(target.log_tail))
