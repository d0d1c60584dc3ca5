# ruff: noqa: N815 - shape suffixes on fields
"""`rows.row_stats` straight from hidden states: the head's rows (the vocabulary) a slice at a time, all tokens at once.

A tile of logits is made, read and forgotten while it is in the processor's cache, and the head's weights are read once
per block of tokens instead of once per chunk. Logits of a whole row never exist, so this serves losses whose gradient
lives on the kept tokens alone. For CPUs: on a GPU hundreds of small kernels would take longer than the products.

Exponentials are summed relative to an origin that is known before the first tile: the largest of a few of the row's
logits. Where another lies so far above it that a sum overflows, everything is done again from the true maximum.

Shape legend: N tokens of a block, H hidden width, V vocabulary, K kept tokens, W width of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_core.fast.rows import RowStats

TILE_ENTRIES = 1 << 17
"""Logits of a tile: half a megabyte in float32."""
_LEAST_WIDTH = 256
_FINITE = -1e30
"""Stands for the maximum of logits that are all -inf."""


@torch.no_grad()
def head_stats(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, index_NK: Tensor, ids_N: Tensor
) -> RowStats:
    """The statistics of the rows `hidden weight' + bias`, of one token at least; `top_N` is the origin."""
    head = _TiledHead(hidden_NH, weight_VH, bias_V)
    wanted_NL = torch.cat([index_NK, ids_N.unsqueeze(-1)], dim=-1)
    picks = _Picks.of(wanted_NL, head)
    origin_N1 = head.at(wanted_NL[:, :: max(1, index_NK.shape[-1])]).amax(-1, keepdim=True)
    sums = _summed(head, picks, origin_N1)
    if not sums.finite:
        sums = _summed(head, picks, head.top())
    return sums.stats(index_NK, ids_N)


@dataclass(frozen=True)
class _TiledHead:
    """The logits `hidden weight' + bias` of N tokens, of which only a tile exists at a time."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is summed in."""
        return torch.promote_types(self.weight_VH.dtype, torch.float32)

    @property
    def width(self) -> int:
        return min(len(self.weight_VH), max(_LEAST_WIDTH, TILE_ENTRIES // len(self.hidden_NH)))

    def tiles(self) -> Iterator[Tensor]:
        """(N, W) of one slice of the vocabulary after the other; each may be overwritten, and is by the next."""
        tokens = len(self.hidden_NH)
        memory = self.hidden_NH.new_empty(tokens * self.width)
        for start in range(0, len(self.weight_VH), self.width):
            part_WH = self.weight_VH[start : start + self.width]
            tile_NW = memory[: tokens * len(part_WH)].view(tokens, len(part_WH))
            torch.mm(self.hidden_NH, part_WH.T, out=tile_NW)
            if self.bias_V is not None:
                tile_NW += self.bias_V[start : start + self.width]
            yield tile_NW.to(self.dtype)

    def at(self, index_NL: Tensor) -> Tensor:
        """The logits of a few tokens of the vocabulary, (N, L)."""
        logits_NL = (self.weight_VH[index_NL] @ self.hidden_NH.unsqueeze(-1)).squeeze(-1)
        return (logits_NL if self.bias_V is None else logits_NL + self.bias_V[index_NL]).to(self.dtype)

    def top(self) -> Tensor:
        """The largest logit of each row, (N, 1)."""
        top_N1 = self.hidden_NH.new_full((len(self.hidden_NH), 1), _FINITE, dtype=self.dtype)
        for tile_NW in self.tiles():
            top_N1 = torch.maximum(top_N1, tile_NW.amax(-1, keepdim=True))
        return top_N1


@dataclass(frozen=True)
class _Picks:
    """Places whose logits are wanted, L of each row, in the order of the tiles that they are in."""

    order: Tensor
    """(N L,): which of the flattened (N, L) each is."""
    places: Tensor
    """(N L,): where it is in its flattened tile."""
    bounds: list[int]
    """Where each tile's begin."""

    @classmethod
    def of(cls, index_NL: Tensor, head: _TiledHead) -> _Picks:
        vocabulary, width = len(head.weight_VH), head.width
        columns, order = index_NL.flatten().sort()
        first = columns // width * width
        places = order // index_NL.shape[-1] * (vocabulary - first).clamp(max=width) + columns - first
        edges = torch.arange(0, vocabulary + width, width, device=columns.device)
        return cls(order, places, torch.searchsorted(columns, edges).tolist())

    def of_tile(self, number: int) -> slice:
        return slice(self.bounds[number], self.bounds[number + 1])


@dataclass(frozen=True)
class _Sums:
    """Of rows of logits, counted from an origin."""

    origin_N: Tensor
    picked_NL: Tensor
    rest_N: Tensor
    """Sum of e^l over all that was not picked."""
    moment_N: Tensor
    """Sum of l e^l over all."""

    @property
    def finite(self) -> bool:
        return bool((self.rest_N + self.moment_N + self.picked_NL.exp().sum(-1)).isfinite().all())

    def stats(self, index_NK: Tensor, ids_N: Tensor) -> RowStats:
        """The last of those picked is the response token, a kept one or not."""
        picked_NK, chosen_N = self.picked_NL[:, :-1], self.picked_NL[:, -1]
        apart_N = (index_NK != ids_N.unsqueeze(-1)).all(-1)
        rest_N = self.rest_N + torch.where(apart_N, chosen_N.exp(), 0.0)
        whole_N = rest_N + picked_NK.exp().sum(-1)
        lse_N = whole_N.log()
        return RowStats(
            top_N=self.origin_N,
            lse_N=lse_N,
            picked_NK=picked_NK.contiguous(),
            chosen_N=chosen_N.contiguous(),
            entropy_N=(lse_N - self.moment_N / whole_N).clamp(min=0.0),
            rest_N=rest_N.log(),
        )


def _summed(head: _TiledHead, picks: _Picks, origin_N1: Tensor) -> _Sums:
    picked, rest_N, moment_N = (origin_N1.new_zeros(n) for n in (len(picks.order), len(origin_N1), len(origin_N1)))
    memory = origin_N1.new_empty(len(origin_N1) * head.width)
    for number, tile_NW in enumerate(head.tiles()):
        mine = picks.of_tile(number)
        places = picks.places[mine]
        exp_NW = memory[: tile_NW.numel()].view_as(tile_NW)
        torch.exp(tile_NW.sub_(origin_N1), out=exp_NW)
        torch.index_select(tile_NW.view(-1), 0, places, out=picked[mine])
        moment_N += _dot_(tile_NW, exp_NW)
        rest_N += exp_NW.view(-1).index_fill_(0, places, 0.0).view_as(exp_NW).sum(-1)
    picked_NL = torch.empty_like(picked).index_copy_(0, picks.order, picked).view(len(origin_N1), -1)
    return _Sums(origin_N1.squeeze(-1), picked_NL, rest_N, moment_N)


def _dot_(logits_NW: Tensor, exp_NW: Tensor) -> Tensor:
    """Row by row, overwriting the logits; one of -inf has weight 0 and counts as 0."""
    dot_N = logits_NW.mul_(exp_NW).sum(-1)
    if bool(dot_N.sum().isnan()):
        dot_N = logits_NW.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1)
    return dot_N
