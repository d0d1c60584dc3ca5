"""How far the student is from the teacher at each response token: divergences on four supports.

Shape legend: B samples, T response tokens, V vocabulary, K kept tokens. Leading dimensions are free ("..."), so the
same code serves (B, T, V) and (T, V).

Conventions
* `alpha` weights the TEACHER in the mixture M = (1 - alpha) S + alpha T. Exactly 0 is the forward KL(T||S), exactly 1
  the reverse KL(S||T); between them (1 - alpha) KL(S||M) + alpha KL(T||M). The ends are branches, not limits: the
  mixture formula goes to 0 there. Source of the formulas: lasgroup/SDPO core_algos.py, restated in docs/algorithm.md.
* Natural logarithms, float32, log space throughout. Log-probs below LOGP_FLOOR (a vocabulary entry masked with -inf)
  are raised to it, so 0 * inf cannot arise; reverse KL against a forbidden token is then large and finite.
* The teacher carries no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Support = Literal["teacher", "student", "full", "sampled"]
Outside = Literal["tail", "renormalise"]

LOGP_FLOOR = -1e5
"""Stands for -inf. Far below any log-prob that a finite float32 logit produces in practice."""
TAIL_FLOOR = math.log(1e-7)
"""Log mass of an empty tail bucket. Below it a float32 complement is rounding noise; no gradient flows there."""
_REMOVED = -1e30  # finite stand-in for -inf: logsumexp over an all-removed row must not give NaN gradients


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence, on which tokens. Holds any combination; `Options` refuses those that do not train."""

    alpha: float
    support: Support
    top_k: int | None = None
    """K of the top-K supports, cut to V. With `sampled`: None = the teacher's exact log-prob of the sampled token;
    K = exact only inside the teacher's top K, `sampled_floor` outside it (CLaaS)."""
    outside: Outside = "tail"
    sampled_floor: float = -20.0
    limits: bool = True
    """False: use the mixture formula at alpha 0 and 1 too (CLaaS at alpha 0: identically zero)."""


GAP = DivergenceSpec(alpha=0.0, support="teacher", top_k=100)
"""How far it is to the teacher, whatever is trained: the forward KL over its top tokens and a tail. The divergence that
is trained would not do: a mixture has a bound of its own (.325 nats at alpha .1), a sampled loss is no distance."""


@dataclass(frozen=True)
class Target:
    """What is kept of the teacher for one batch or one sample; no gradient.

    `logp`: (..., K) with `index` for support "teacher"; (..., V) for "student" and "full"; (...) for "sampled".
    `log_tail`: (...) log mass outside `index`, for support "teacher".
    `gap`: the buckets of `GAP`, where the fields above are not these.
    `states`: (..., H) what the output head makes the teacher's logits of, kept by the fast path in the place of rows as
    wide as the vocabulary; `logp` is then (...), of each token's likeliest.
    """

    logp: Tensor
    index: Tensor | None = None
    log_tail: Tensor | None = None
    gap: Target | None = None
    states: Tensor | None = None


def log_probs(logits: Tensor) -> Tensor:
    """Float32 log-softmax over the last dimension, bounded below by LOGP_FLOOR. Gradients keep the input's dtype."""
    return scores(logits).logp


@dataclass(frozen=True)
class Scores:
    """A model's logits (..., V), float32, counted from the row's largest, and their log-probs. Renormalising over K
    tokens starts from the logits: from the log-probs it would send rounding noise into the other tokens' gradients,
    which Adam then scales up to steps."""

    logits: Tensor
    logp: Tensor


def scores(logits_V: Tensor) -> Scores:
    """Logits of any float dtype (..., V) as `Scores`.

    Not by torch's log_softmax: on a CPU it adds up 152k exponentials one after the other, in float32, and is off by
    some 1e-5, each ratio with it.
    """
    logits = logits_V.float()
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return Scores(logits, (logits - torch.logsumexp(logits, dim=-1, keepdim=True)).clamp(min=LOGP_FLOOR))


def token_log_probs(logp_V: Tensor, ids: Tensor) -> Tensor:
    """(..., V), (...) -> (...): the log-prob of each given token."""
    return logp_V.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logp_V: Tensor) -> Tensor:
    """(..., V) -> (...): entropy in nats."""
    return -(logp_V.exp() * logp_V).sum(-1)


def top_k_indices(logp_V: Tensor, top_k: int | None) -> Tensor:
    """Indices of the min(K, V) most probable tokens, (..., K)."""
    if top_k is None:
        raise ValueError("a top-K support needs top_k")
    return logp_V.detach().topk(min(max(1, top_k), logp_V.shape[-1]), dim=-1).indices


def log_tail_outside(logp_V: Tensor, index_K: Tensor) -> Tensor:
    """Log mass of the tokens not in `index_K`, (..., V), (..., K) -> (...).

    Summed over those tokens. The complement 1 - sum(kept) equals it on paper, but cancels to noise for a peaked
    student, and its gradient with it.
    """
    rest_V = logp_V.scatter(-1, index_K, _REMOVED)
    return torch.logsumexp(rest_V, dim=-1).clamp(min=TAIL_FLOOR)


def log_tail_from_kept(logp_K: Tensor) -> Tensor:
    """Log mass outside the kept tokens where nothing but the kept log-probs is known, (..., K) -> (...)."""
    log_mass = torch.logsumexp(logp_K, dim=-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_mass))


def teacher_target(teacher_logits_V: Tensor, response_ids: Tensor, spec: DivergenceSpec) -> Target:
    """Keep of the teacher's logits (..., V) what `spec` and `GAP` need; `response_ids` (...) matter for "sampled"."""
    logp_V = log_probs(teacher_logits_V.detach())
    if keeps_gap(spec):
        return _top_tokens(logp_V, spec.top_k)
    gap = _top_tokens(logp_V, GAP.top_k)
    if spec.support == "sampled":
        return Target(_sampled_teacher(logp_V, response_ids, spec), gap=gap)
    if spec.support != "teacher":
        return Target(logp_V, gap=gap)
    return replace(_top_tokens(logp_V, spec.top_k), gap=gap)


def keeps_gap(spec: DivergenceSpec) -> bool:
    """Whether what `spec` keeps of the teacher are the buckets of `GAP` already."""
    return spec.support == "teacher" and spec.top_k == GAP.top_k


def _top_tokens(logp_V: Tensor, top_k: int | None) -> Target:
    index_K = top_k_indices(logp_V, top_k)
    return Target(logp_V.gather(-1, index_K), index_K, log_tail_outside(logp_V, index_K))


def _sampled_teacher(logp_V: Tensor, response_ids: Tensor, spec: DivergenceSpec) -> Tensor:
    exact = token_log_probs(logp_V, response_ids)
    if spec.top_k is None:
        return exact
    index_K = top_k_indices(logp_V, spec.top_k)
    return floor_outside_top_k(exact, index_K, response_ids, spec.sampled_floor)


def floor_outside_top_k(logp: Tensor, index_K: Tensor, response_ids: Tensor, floor: float) -> Tensor:
    """`logp` (...) where the token is among `index_K` (..., K), `floor` elsewhere."""
    inside = (index_K == response_ids.unsqueeze(-1)).any(-1)
    return torch.where(inside, logp, torch.full_like(logp, floor))


def token_divergence(student: Scores, target: Target, response_ids: Tensor, spec: DivergenceSpec) -> Tensor:
    """Divergence per response token, (...), with gradient into the student only.

    Support "sampled" returns stopgrad(s_y - t_y) * s_y: its gradient is an unbiased reverse-KL gradient for y drawn
    from the student, its VALUE is not a divergence (it is often negative).
    """
    if spec.support == "sampled":
        return sampled_divergence(token_log_probs(student.logp, response_ids), target)
    return bucket_divergence(*_buckets(student, target, spec), spec)


@torch.no_grad()
def token_gap(student: Scores, target: Target) -> Tensor:
    """`GAP` per response token, (...); NaN for a target made by hand without the teacher's top tokens and a tail."""
    kept = gap_buckets(target)
    if kept is None:
        return torch.full_like(student.logp[..., 0], math.nan)
    return bucket_divergence(*_buckets(student, kept, GAP), GAP)


def gap_buckets(target: Target) -> Target | None:
    """The part of a target that `GAP` is measured against."""
    kept = target if target.gap is None else target.gap
    return None if kept.index is None or kept.log_tail is None else kept


def sampled_divergence(student_y: Tensor, target: Target) -> Tensor:
    """stopgrad(s_y - t_y) * s_y of the response tokens' log-probs, (...)."""
    return (student_y - target.logp.detach()).detach() * student_y


def bucket_divergence(student_logp: Tensor, teacher_logp: Tensor, spec: DivergenceSpec) -> Tensor:
    """The divergence of two distributions over the same few buckets, (..., K) -> (...)."""
    if spec.limits and spec.alpha == 0.0:
        return _kl(teacher_logp, student_logp)
    if spec.limits and spec.alpha == 1.0:
        return _kl(student_logp, teacher_logp)
    return mixture_divergence(student_logp, teacher_logp, spec.alpha)


def kept_buckets(
    picked_K: Tensor, lse: Tensor, rest: Tensor, target: Target, spec: DivergenceSpec
) -> tuple[Tensor, Tensor]:
    """Both sides' buckets for support "teacher" from what was read of the student's logits: those at `target.index`
    (..., K), their logsumexp over the vocabulary and over the tokens outside the index (...)."""
    if spec.outside == "renormalise":
        return log_probs(picked_K.clamp(min=LOGP_FLOOR)), log_probs(target.logp)
    if target.log_tail is None:
        raise ValueError("outside='tail' needs a target with the teacher's tail mass")
    student_K = (picked_K - lse.unsqueeze(-1)).clamp(min=LOGP_FLOOR)
    student_tail = (rest - lse).clamp(min=TAIL_FLOOR)
    return _append(student_K, student_tail), _append(target.logp, target.log_tail)


def mixture_divergence(student_logp: Tensor, teacher_logp: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) KL(S||M) + alpha KL(T||M) over the last dimension, M = (1 - alpha) S + alpha T.

    In [0, h(alpha)] with h the binary entropy in nats (ln 2 at alpha .5); identically 0 at alpha 0 and 1.
    """
    mixture = torch.logaddexp(student_logp + _log(1.0 - alpha), teacher_logp + _log(alpha))
    # At alpha 0 or 1 one side may meet a mixture of -inf; its weight is 0, so the floor only prevents 0 * inf.
    mixture = mixture.clamp(min=LOGP_FLOOR)
    return (1.0 - alpha) * _kl(student_logp, mixture) + alpha * _kl(teacher_logp, mixture)


def _buckets(student: Scores, target: Target, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides on the support: kept tokens, plus the tail bucket or renormalised."""
    teacher_all = target.logp.detach()
    if spec.support == "full":
        return student.logp, teacher_all
    if spec.support == "student":
        index_K = top_k_indices(student.logp, spec.top_k)
        teacher_K = teacher_all.gather(-1, index_K)
        teacher_tail = log_tail_outside(teacher_all, index_K) if spec.outside == "tail" else None
    else:
        if target.index is None:
            raise ValueError("support 'teacher' needs a target with the teacher's top-K indices")
        index_K, teacher_K, teacher_tail = target.index, teacher_all, target.log_tail
    if spec.outside == "renormalise":
        kept_logits = student.logits.gather(-1, index_K).clamp(min=LOGP_FLOOR)
        return log_probs(kept_logits), log_probs(teacher_K)
    if teacher_tail is None:
        raise ValueError("outside='tail' needs a target with the teacher's tail mass")
    student_tail = log_tail_outside(student.logp, index_K)
    student_K = student.logp.gather(-1, index_K)
    return _append(student_K, student_tail), _append(teacher_K, teacher_tail.detach())


def _append(logp_K: Tensor, log_tail: Tensor) -> Tensor:
    return torch.cat([logp_K, log_tail.unsqueeze(-1)], dim=-1)


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() * (p_log - q_log)).sum(-1)


def _log(x: float) -> float:
    return math.log(x) if x > 0.0 else -math.inf
