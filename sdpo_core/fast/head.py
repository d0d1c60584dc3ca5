# ruff: noqa: N815 - shape suffixes on fields
"""From hidden states to per-token losses and back into hidden states, a chunk of tokens at a time.

Shape legend: N response tokens of a micro-batch, H hidden width, V vocabulary, K kept tokens. The logits of one chunk
are the only thing as wide as the vocabulary. What is differentiated by autograd is (N, K) and smaller; its gradient
with respect to the logits is put together by `rows.row_grad_`, and where nothing but the kept logits has one (the
renormalised divergence without anchors), by a weighted sum of K rows of the head, without any logits at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.fast.records import joined, narrowed
from sdpo_core.fast.rows import RowStats
from sdpo_core.fast.rows_triton import rows_for
from sdpo_core.fast.scores import LEAST_CHUNK, Head, chunk_tokens, chunks
from sdpo_core.fast.tiles import head_stats
from sdpo_core.fast.whole_rows import on_students_tokens, with_whole_rows
from sdpo_core.signals import PolicyGradient
from sdpo_core.terms import BASE_DISTANCE, StudentView, TokenTerms, clean, terms_of, token_terms

TILED_CHUNK = 256
"""Tokens at a time where logits are made in tiles (sdpo_core.fast.tiles)."""


@dataclass(frozen=True)
class RowInputs:
    """What else the loss needs of each response token, (N,) each; names as in `terms.terms_of`."""

    weights_N: Tensor
    """Of the token in the loss."""
    behaviour_N: Tensor
    """NaN = the student's own."""
    base_logp_N: Tensor | None = None
    base_target: Target | None = None
    previous_logp_N: Tensor | None = None
    token_weights_N: Tensor | None = None
    advantage_N: Tensor | None = None
    """Under a policy gradient."""


@dataclass(frozen=True)
class LossSpec:
    """The options that the loss of a token depends on."""

    divergence: DivergenceSpec
    is_clip: float | None
    base_kl_weight: float = 0.0
    previous_kl_weight: float = 0.0
    policy_gradient: PolicyGradient | None = None

    @property
    def sparse(self) -> bool:
        """Whether nothing but the kept logits has a gradient."""
        kept_only = self.divergence.support in ("teacher", "student") and self.divergence.outside == "renormalise"
        return kept_only and self.base_kl_weight == self.previous_kl_weight == 0.0


def loss_and_gradient(
    head: Head, hidden_NH: Tensor, ids_N: Tensor, target: Target, inputs: RowInputs, spec: LossSpec, size: int
) -> tuple[TokenTerms, Tensor]:
    """Terms of all tokens, detached (N,), and the gradient of sum(weights x loss) into the hidden states, (N, H).

    `size`: tokens of a chunk; 0 = what suits.
    """
    hidden_NH = hidden_NH.detach()
    size = size or _chunk_size(head, hidden_NH, target, inputs, spec)
    gradient_NH = torch.empty_like(hidden_NH)
    found = []
    for start, length in chunks(len(ids_N), size):
        terms, part_NH = _chunk(
            head, hidden_NH.narrow(0, start, length), ids_N.narrow(0, start, length),
            narrowed(target, start, length), narrowed(inputs, start, length), spec,
        )  # fmt: skip
        gradient_NH.narrow(0, start, length).copy_(part_NH)
        found.append(terms)
    return joined(found), gradient_NH


def _chunk_size(head: Head, hidden_NH: Tensor, target: Target, inputs: RowInputs, spec: LossSpec) -> int:
    if _tiled(hidden_NH, target, inputs, spec):
        return TILED_CHUNK
    size = chunk_tokens(len(head.weight_VH))
    return max(LEAST_CHUNK, size // 4) if spec.divergence.support == "full" else size  # autograd keeps copies


@torch.enable_grad()
def _chunk(
    head: Head, hidden_NH: Tensor, ids_N: Tensor, target: Target, inputs: RowInputs, spec: LossSpec
) -> tuple[TokenTerms, Tensor]:
    """The small graph from the statistics to the loss begins and ends here, whatever the caller's mode."""
    if spec.divergence.support == "full":
        return _dense_chunk(head, hidden_NH, ids_N, target, inputs, spec)
    on_N = torch.ones_like(ids_N, dtype=torch.bool)
    logits_NV = None if _tiled(hidden_NH, target, inputs, spec) else head.logits(hidden_NH)
    if spec.divergence.support == "student":
        assert logits_NV is not None  # noqa: S101 - tiles are for the teacher's tokens
        target = on_students_tokens(logits_NV, target, ids_N, spec.divergence, head.logits)
    target = clean(target, on_N)
    index_NK = ids_N.new_empty(len(ids_N), 0) if target.index is None else target.index
    stats = (
        head_stats(hidden_NH, head.weight_VH, head.bias_V, index_NK, ids_N)
        if logits_NV is None
        else rows_for(logits_NV).row_stats(logits_NV, index_NK, ids_N)
    )
    leaves = _Leaves.of(stats)
    view = StudentView(
        logp=leaves.logp(),
        divergence=leaves.divergence(target, spec.divergence),
        gap=_gap(logits_NV, ids_N, stats, target),
        entropy=stats.entropy_N,
        base_kl=None if logits_NV is None else _base_distance(logits_NV, ids_N, inputs.base_target, on_N),
    )
    terms = terms_of(
        view, target, on_N, is_clip=spec.is_clip, behaviour_BT=inputs.behaviour_N,
        base_logp_BT=inputs.base_logp_N, previous_logp_BT=inputs.previous_logp_N,
        token_weights_BT=inputs.token_weights_N, policy_gradient=spec.policy_gradient, advantage_BT=inputs.advantage_N,
    )  # fmt: skip
    loss = (terms.loss(spec.base_kl_weight, spec.previous_kl_weight) * inputs.weights_N).sum()
    slopes = leaves.slopes(loss)
    if spec.sparse and slopes.picked_NK is not None and len(ids_N) > 0:
        return _detached(terms), kept_gradient(head, index_NK, slopes.picked_NK)
    assert logits_NV is not None  # noqa: S101 - tiles are for sparse losses
    return _detached(terms), _through_head(head, logits_NV, stats, slopes, index_NK, ids_N)


@torch.enable_grad()
def _dense_chunk(
    head: Head, hidden_NH: Tensor, ids_N: Tensor, target: Target, inputs: RowInputs, spec: LossSpec
) -> tuple[TokenTerms, Tensor]:
    """Over the full vocabulary, where nothing is left out: the plain path's terms, of one chunk."""
    logits_NV = head.logits(hidden_NH).requires_grad_()
    terms = token_terms(
        logits_NV, with_whole_rows(target, head.logits), ids_N, torch.ones_like(ids_N), spec.divergence,
        is_clip=spec.is_clip, behaviour_BT=inputs.behaviour_N, base_logp_BT=inputs.base_logp_N,
        base_target=inputs.base_target, previous_logp_BT=inputs.previous_logp_N,
        token_weights_BT=inputs.token_weights_N,
    )  # fmt: skip
    loss = (terms.loss(spec.base_kl_weight, spec.previous_kl_weight) * inputs.weights_N).sum()
    (grad_NV,) = torch.autograd.grad(loss, logits_NV)
    return _detached(terms), grad_NV.to(head.weight_VH.dtype) @ head.weight_VH


def _tiled(hidden_NH: Tensor, target: Target, inputs: RowInputs, spec: LossSpec) -> bool:
    """Whether no row of logits need ever be whole: one reading, of one known set of tokens, is all there is."""
    read_once = target.index is not None and inputs.base_target is None and target.gap is None
    return spec.sparse and read_once and not hidden_NH.is_cuda and len(hidden_NH) > 0


@dataclass(frozen=True)
class _Leaves:
    """What was read of the logits, as the leaves of a small graph."""

    lse_N: Tensor
    rest_N: Tensor
    picked_NK: Tensor
    chosen_N: Tensor

    @classmethod
    def of(cls, stats: RowStats) -> _Leaves:
        return cls(*(t.requires_grad_() for t in (stats.lse_N, stats.rest_N, stats.picked_NK, stats.chosen_N)))

    def logp(self) -> Tensor:
        return (self.chosen_N - self.lse_N).clamp(min=dv.LOGP_FLOOR)

    def divergence(self, target: Target, spec: DivergenceSpec) -> Tensor:
        if spec.support == "sampled":
            return dv.sampled_divergence(self.logp(), target)
        return dv.bucket_divergence(*dv.kept_buckets(self.picked_NK, self.lse_N, self.rest_N, target, spec), spec)

    def slopes(self, loss: Tensor) -> _Slopes:
        leaves = (self.lse_N, self.rest_N, self.picked_NK, self.chosen_N)
        return _Slopes(*torch.autograd.grad(loss, leaves, allow_unused=True))


@dataclass(frozen=True)
class _Slopes:
    """Of the loss with respect to each leaf; None: it does not depend on it."""

    lse_N: Tensor | None
    rest_N: Tensor | None
    picked_NK: Tensor | None
    chosen_N: Tensor | None


def _through_head(
    head: Head, logits_NV: Tensor, stats: RowStats, slopes: _Slopes, index_NK: Tensor, ids_N: Tensor
) -> Tensor:
    """The dense gradient into the hidden states, (N, H). Overwrites the logits."""
    weight_VH = head.weight_VH
    zeros_N = torch.zeros_like(stats.lse_N)
    lse_N, chosen_N = _or(slopes.lse_N, zeros_N), _or(slopes.chosen_N, zeros_N)
    at_index_NK = _or(slopes.picked_NK, torch.zeros_like(stats.picked_NK))
    at_index_NK = at_index_NK + lse_N.unsqueeze(-1) * (stats.picked_NK - stats.lse_N.unsqueeze(-1)).exp()
    spread_N = lse_N + _over_rest(_or(slopes.rest_N, zeros_N), stats)
    grad_NV = rows_for(logits_NV).row_grad_(
        logits_NV, stats.top_N, (spread_N * (-stats.lse_N).exp()).detach(), index_NK, at_index_NK.detach(), ids_N,
        chosen_N,
    )  # fmt: skip
    return grad_NV.to(weight_VH.dtype) @ weight_VH


def kept_gradient(head: Head, index_NK: Tensor, amounts_NK: Tensor) -> Tensor:
    """sum_k amounts_nk W[index_nk], (N, H): no cost depends on the vocabulary."""
    amounts_NK = amounts_NK.to(head.weight_VH.dtype)
    return functional.embedding_bag(index_NK, head.weight_VH, per_sample_weights=amounts_NK, mode="sum")


def _over_rest(slope_N: Tensor, stats: RowStats) -> Tensor:
    """Of the softmax outside the kept tokens: slope / their mass. Below the tail's floor no slope arrives."""
    mass_N = (stats.rest_N - stats.lse_N).exp()
    return torch.where(slope_N == 0.0, slope_N, slope_N / mass_N)


@torch.no_grad()
def _base_distance(logits_NV: Tensor, ids_N: Tensor, base: Target | None, on_N: Tensor) -> Tensor | None:
    if base is None or base.index is None:
        return None
    stats, base = rows_for(logits_NV).row_stats(logits_NV, base.index, ids_N), clean(base, on_N)
    buckets = dv.kept_buckets(stats.picked_NK, stats.lse_N, stats.rest_N, base, BASE_DISTANCE)
    return dv.bucket_divergence(*buckets, BASE_DISTANCE)


@torch.no_grad()
def _gap(logits_NV: Tensor | None, ids_N: Tensor, stats: RowStats, target: Target) -> Tensor:
    """`divergence.token_gap`; another reading of the logits only where the loss does not use its buckets."""
    kept = dv.gap_buckets(target)
    if kept is None or kept.index is None:
        return torch.full_like(stats.lse_N, torch.nan)
    if kept is not target:
        assert logits_NV is not None  # noqa: S101 - tiles are for one set of kept tokens
        stats = rows_for(logits_NV).row_stats(logits_NV, kept.index, ids_N)
    return dv.bucket_divergence(*dv.kept_buckets(stats.picked_NK, stats.lse_N, stats.rest_N, kept, dv.GAP), dv.GAP)


def _detached(terms: TokenTerms) -> TokenTerms:
    return TokenTerms(**{name: value.detach() for name, value in vars(terms).items()})


def _or(slope: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if slope is None else slope
