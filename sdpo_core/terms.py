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
from sdpo_core.signals import PolicyGradient, advantage_loss, advantages_of
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
    """Teacher-student distance before weights, the same whatever is trained (`divergence.GAP`)."""
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

    def loss(self, base_kl_weight: float = 0.0, previous_kl_weight: float = 0.0) -> Tensor:
        """What is summed into the loss, before the rows' weights. An anchor of weight 0 leaves no graph behind."""
        loss_BT = self.distill
        if base_kl_weight > 0:
            loss_BT = loss_BT + base_kl_weight * self.anchor
        if previous_kl_weight > 0:
            loss_BT = loss_BT + previous_kl_weight * self.previous_anchor
        return loss_BT


@dataclass(frozen=True)
class StudentView:
    """All that the loss takes from the student's distributions, however it was computed; (B, T) or any one shape."""

    logp: Tensor
    """Of the response tokens, with gradient."""
    divergence: Tensor
    """From the teacher (`divergence.token_divergence`), with gradient."""
    gap: Tensor
    """As in TokenTerms."""
    entropy: Tensor
    base_kl: Tensor | None
    """As in TokenTerms; None without a base target."""


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
    student = dv.scores(torch.where(on_BT1, student_logits_BTV, torch.zeros_like(student_logits_BTV)))
    target = clean(target, on_BT)
    divergence = dv.token_divergence(student, target, response_ids_BT, spec)
    view = StudentView(
        logp=dv.token_log_probs(student.logp, response_ids_BT),
        divergence=divergence,
        gap=divergence.detach() if spec == dv.GAP else dv.token_gap(student, target),
        entropy=dv.entropy(student.logp.detach()),
        base_kl=_base_distance(student, base_target, response_ids_BT, on_BT),
    )
    return terms_of(
        view, target, on_BT, is_clip=is_clip, behaviour_BT=behaviour_BT, base_logp_BT=base_logp_BT,
        previous_logp_BT=previous_logp_BT, token_weights_BT=token_weights_BT, policy_gradient=policy_gradient,
        rewards_B=rewards_B,
    )  # fmt: skip


def terms_of(
    view: StudentView,
    target: Target,
    on_BT: Tensor,
    *,
    is_clip: float | None,
    behaviour_BT: Tensor | None = None,
    base_logp_BT: Tensor | None = None,
    previous_logp_BT: Tensor | None = None,
    token_weights_BT: Tensor | None = None,
    policy_gradient: PolicyGradient | None = None,
    rewards_B: Tensor | None = None,
    advantage_BT: Tensor | None = None,
) -> TokenTerms:
    """`token_terms` from what was read of the student; `target` is clean, `on_BT` boolean.

    `advantage_BT`: where the rows are no whole answers, those of the `policy_gradient`, computed from whole ones.
    """
    logp_BT = view.logp.detach()
    behaviour = logp_BT
    if behaviour_BT is not None:
        behaviour = torch.where(on_BT & ~behaviour_BT.isnan(), behaviour_BT.detach().float(), logp_BT)
    ratio = importance_ratio(logp_BT, behaviour, is_clip)
    distill = view.divergence * ratio
    if policy_gradient is not None:
        if advantage_BT is None:
            advantage_BT = advantages_of(logp_BT, target.logp, behaviour, on_BT, policy_gradient, rewards_B)
        distill = advantage_loss(view.logp, behaviour, advantage_BT, policy_gradient)
    if token_weights_BT is not None:
        distill = distill * token_weights_BT.detach().float()

    def keep(x_BT: Tensor) -> Tensor:
        return torch.where(on_BT, x_BT, torch.zeros_like(x_BT))

    def anchored(anchor_BT: Tensor | None) -> Tensor:
        if anchor_BT is None:
            return torch.zeros_like(logp_BT)
        return keep(k3(view.logp, torch.where(on_BT, anchor_BT.detach().float(), logp_BT)))

    return TokenTerms(
        distill=keep(distill),
        anchor=anchored(base_logp_BT),
        previous_anchor=anchored(previous_logp_BT),
        gap=keep(view.gap),
        ratio=keep(ratio),
        raw_ratio=keep(bounded_log_ratio(logp_BT, behaviour).exp()),
        base_kl=torch.zeros_like(logp_BT) if view.base_kl is None else keep(view.base_kl),
        entropy=keep(view.entropy),
        logp=keep(logp_BT),
    )


@torch.no_grad()
def _base_distance(student: dv.Scores, base: Target | None, response_ids_BT: Tensor, on_BT: Tensor) -> Tensor | None:
    if base is None:
        return None
    return dv.token_divergence(student, clean(base, on_BT), response_ids_BT, BASE_DISTANCE)


def clean(target: Target, on_BT: Tensor) -> Target:
    """Detach the teacher, put 0 where the mask is off, and replace -inf by the floor."""

    def tidy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        on = on_BT.unsqueeze(-1) if x.dim() > on_BT.dim() else on_BT
        return torch.where(on, x.detach().float(), 0.0).clamp(min=dv.LOGP_FLOOR)

    logp = tidy(target.logp)
    assert logp is not None  # noqa: S101 - narrows the type; a target always has log-probs
    gap = None if target.gap is None else clean(target.gap, on_BT)
    return Target(logp, target.index, tidy(target.log_tail), gap, target.states)
