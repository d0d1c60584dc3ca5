# ruff: noqa: N815 - shape suffixes on fields
"""All the work that is as wide as the vocabulary, in plain torch: two functions, and nothing else needs to see V.

Shape legend: N tokens of a chunk, V vocabulary, K kept tokens (distinct within a row).

`row_stats` reads logits and gives what a loss can be made of; whatever the loss is, its gradient with respect to the
logits is then `row_grad_`: a multiple of the softmax, other values at the kept tokens, one more at the response token.
rows_triton.py holds the same two as GPU kernels, if present.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_core.fast.records import joined

_CACHED = 1 << 18
"""Logits that are read at a time: a megabyte in float32."""
_FINITE = -1e30
"""Stands for -inf where a product with probability 0 must be 0."""


@dataclass(frozen=True)
class RowStats:
    """What the loss reads of each row of logits; float32 (float64 for float64 logits).

    Logits are counted from one of the row's largest: a log-prob is a difference of two of them, and at the size of the
    logits themselves (some hundred) float32 would round it to 1e-5.
    """

    top_N: Tensor
    """The logit from which the others are counted: the row's largest, or one near it (`tiles.head_stats`)."""
    lse_N: Tensor
    """logsumexp of the row."""
    picked_NK: Tensor
    """Logits at `index_NK`."""
    chosen_N: Tensor
    """Logit of the response token."""
    entropy_N: Tensor
    """Nats."""
    rest_N: Tensor
    """logsumexp over the tokens outside `index_NK`: summed, never a complement. -inf when nothing is left."""


@torch.no_grad()
def row_stats(logits_NV: Tensor, index_NK: Tensor, ids_N: Tensor) -> RowStats:
    """One reading of the logits (any float dtype; -inf is allowed where another logit is finite). K may be 0.

    A few rows at a time: what is computed from them stays in the cache instead of being as large as the logits.
    """
    rows = max(1, _CACHED // logits_NV.shape[-1])
    starts = range(0, max(len(logits_NV), 1), rows)
    return joined([_stats(*(t[i : i + rows] for t in (logits_NV, index_NK, ids_N))) for i in starts])


def _stats(logits_NV: Tensor, index_NK: Tensor, ids_N: Tensor) -> RowStats:
    logits_NV = logits_NV.to(_wide(logits_NV))
    top_N1 = logits_NV.amax(-1, keepdim=True)
    logits_NV = logits_NV - top_N1
    exp_NV = logits_NV.exp()
    kept_NK = exp_NV.gather(-1, index_NK)
    inner_N = _dot(exp_NV, logits_NV)
    rest_N = exp_NV.scatter_(-1, index_NK, 0.0).sum(-1)
    whole_N = rest_N + kept_NK.sum(-1)
    lse_N = whole_N.log()
    return RowStats(
        top_N=top_N1.squeeze(-1),
        lse_N=lse_N,
        picked_NK=logits_NV.gather(-1, index_NK),
        chosen_N=logits_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1),
        entropy_N=(lse_N - inner_N / whole_N).clamp(min=0.0),
        rest_N=rest_N.log(),
    )


@torch.no_grad()
def row_grad_(
    logits_NV: Tensor,
    origin_N: Tensor,
    spread_N: Tensor,
    index_NK: Tensor,
    at_index_NK: Tensor,
    ids_N: Tensor,
    at_chosen_N: Tensor,
) -> Tensor:
    """Overwrite the logits with a gradient: `spread` x exp(logit - `origin`), a multiple of the softmax, then SET to
    `at_index` at the kept tokens, then `at_chosen` ADDED at the response token.

    Set and not added: under a small tail mass `spread` is huge, and adding its opposite back would leave noise.
    """
    exp_NV = logits_NV.sub_(origin_N.unsqueeze(-1).to(logits_NV.dtype)) if logits_NV.dtype == origin_N.dtype else None
    if exp_NV is None:  # bfloat16 logits: the exponent is taken in float32
        exp_NV = logits_NV.float() - origin_N.unsqueeze(-1)
    grad_NV = exp_NV.exp_().mul_(spread_N.unsqueeze(-1))
    grad_NV.scatter_(-1, index_NK, at_index_NK)
    grad_NV.scatter_add_(-1, ids_N.unsqueeze(-1), at_chosen_N.unsqueeze(-1))
    return grad_NV if grad_NV is logits_NV else logits_NV.copy_(grad_NV)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _dot(exp_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Row by row; a logit of -inf has weight 0 and counts as 0."""
    inner_N: Tensor = torch.linalg.vecdot(exp_NV, logits_NV)
    if not bool(inner_N.isfinite().all()):
        inner_N = torch.linalg.vecdot(exp_NV, logits_NV.clamp(min=_FINITE))
    return inner_N
