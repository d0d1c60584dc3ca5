# ruff: noqa: N815 - shape suffixes on fields
"""`rows.row_stats` straight from hidden states: the head's rows (the vocabulary) a slice at a time, all tokens at once.

A slab of logits is made by one product, read a tile at a time and forgotten, all in the processor's caches. The head's
weights are read once per block of tokens instead of once per chunk. Logits of a whole row never exist, so this serves
losses whose gradient lives on the kept tokens alone. For CPUs: on a GPU hundreds of small kernels would take longer
than the products.

Exponentials are summed relative to an origin that is known before the first tile: the largest of a few of the row's
logits. Where another lies so far above it that a sum overflows, everything is done again from the true maximum.
Logits of tiles are in bits, nats x log2(e): torch's exp2 takes 2.5 times less of a processor than its exp.

Shape legend: N tokens of a block, H hidden width, V vocabulary, K kept tokens, W width of a tile, S of a slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_core.fast.rows import RowStats

TILE_ENTRIES = 1 << 18
"""Logits of a tile: a megabyte in float32."""
SLAB_TILES = 8
"""Tiles of a product. More than one: what is called between two products finds its code and data out of the cache."""
_LEAST_WIDTH = 256
_FINITE = -1e30
"""Stands for -inf: as the maximum of logits that are all so, and where a product with probability 0 must be 0."""
_BITS = math.log2(math.e)
"""Of a nat."""
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@torch.no_grad()
def head_stats(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, index_NK: Tensor, ids_N: Tensor
) -> RowStats:
    """The statistics of the rows `hidden weight' + bias`, of one token at least; `top_N` is the origin."""
    head = _TiledHead(hidden_NH, weight_VH, bias_V)
    wanted_NL = torch.cat([index_NK, ids_N.unsqueeze(-1)], dim=-1)
    picks = _Picks.of(wanted_NL, head)
    origin_N = head.at(wanted_NL[:, :: max(1, index_NK.shape[-1])]).amax(-1)
    sums = _summed(head, picks, origin_N)
    if not sums.finite:
        sums = _summed(head, picks, head.top())
    return sums.stats(index_NK, ids_N)


@dataclass(frozen=True)
class _TiledHead:
    """The logits `weight hidden' + bias` of N tokens, of which only a slab exists at a time."""

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

    def read_tiles(self, origin_N: Tensor, read: Callable[[Tensor], object]) -> None:
        """`read` (W, N) of one slice of the vocabulary after the other, in bits above the origin (in nats).

        It may overwrite them. A slab is gone before the next is made, which then takes its place in the cache.
        """
        size = min(self.width * SLAB_TILES, len(self.weight_VH))
        slab_of = _products(self.hidden_NH, origin_N, size)
        for start in range(0, len(self.weight_VH), size):
            slab_SN = slab_of(self.weight_VH[start : start + size])
            if self.bias_V is not None:
                slab_SN += self.bias_V[start : start + size, None].to(self.dtype) * _BITS
            for tile_WN in torch.split(slab_SN, self.width):
                read(tile_WN)
            del slab_SN, tile_WN

    def at(self, index_NL: Tensor) -> Tensor:
        """The logits of a few tokens of the vocabulary, (N, L)."""
        logits_NL = (self.weight_VH[index_NL] @ self.hidden_NH.unsqueeze(-1)).squeeze(-1)
        return (logits_NL if self.bias_V is None else logits_NL + self.bias_V[index_NL]).to(self.dtype)

    def top(self) -> Tensor:
        """The largest logit of each row, (N,)."""
        zeros_N = self.hidden_NH.new_zeros(len(self.hidden_NH), dtype=self.dtype)
        top_N = zeros_N + _FINITE
        self.read_tiles(zeros_N, lambda tile_WN: torch.maximum(top_N, tile_WN.amax(0) / _BITS, out=top_N))
        return top_N


def _products(hidden_NH: Tensor, origin_N: Tensor, width: int) -> Callable[[Tensor], Tensor]:
    """Rows of the head, (W, H) with W <= `width`, -> their logits above the origin, in bits, (W, N).

    With oneDNN the hidden states, few, are brought into its own order once, and the head's rows are read as they lie;
    `torch.mm` brings both into its order for each product, a tenth of its time here.
    """
    if hidden_NH.dtype == torch.float32 and hidden_NH.device.type == "cpu" and ONEDNN:
        packed, below_N = torch.ops.mkldnn._reorder_linear_weight(hidden_NH * _BITS, width), origin_N * -_BITS
        return lambda part_WH: torch.ops.mkldnn._linear_pointwise(part_WH, packed, below_N, "none", [], "")
    memory = hidden_NH.new_empty(width, len(hidden_NH))

    def product(part_WH: Tensor) -> Tensor:
        tile_WN = torch.mm(part_WH, hidden_NH.T, out=memory[: len(part_WH)])
        return tile_WN.to(origin_N.dtype).sub_(origin_N).mul_(_BITS)

    return product


@dataclass(frozen=True)
class _Picks:
    """Places whose logits are wanted, L of each row, in the order of the tiles that they are in."""

    order: Tensor
    """(N L,): which of the flattened (N, L) each is."""
    places: Tensor
    """(N L,): where it is in its flattened tile."""
    sizes: list[int]
    """How many are in each tile."""

    @classmethod
    def of(cls, index_NL: Tensor, head: _TiledHead) -> _Picks:
        vocabulary, width = len(head.weight_VH), head.width
        columns, order = index_NL.flatten().sort()
        places = columns % width * len(index_NL) + order // index_NL.shape[-1]
        return cls(order, places, torch.bincount(columns // width, minlength=-(-vocabulary // width)).tolist())


@dataclass(frozen=True)
class _Sums:
    """Of rows of logits, in bits above an origin."""

    origin_N: Tensor
    picked_NL: Tensor
    rest_N: Tensor
    """Sum of 2^l over all that was not picked."""
    moment_N: Tensor
    """Sum of l 2^l over all."""

    @property
    def finite(self) -> bool:
        return bool((self.rest_N + self.moment_N + self.picked_NL.exp2().sum(-1)).isfinite().all())

    def stats(self, index_NK: Tensor, ids_N: Tensor) -> RowStats:
        """The last of those picked is the response token, a kept one or not."""
        picked_NK, chosen_N = self.picked_NL[:, :-1], self.picked_NL[:, -1]
        apart_N = (index_NK != ids_N.unsqueeze(-1)).all(-1)
        rest_N = self.rest_N + torch.where(apart_N, chosen_N.exp2(), 0.0)
        whole_N = rest_N + picked_NK.exp2().sum(-1)
        lse_N = whole_N.log()
        return RowStats(
            top_N=self.origin_N,
            lse_N=lse_N,
            picked_NK=picked_NK / _BITS,
            chosen_N=chosen_N / _BITS,
            entropy_N=(lse_N - self.moment_N / whole_N / _BITS).clamp(min=0.0),
            rest_N=rest_N.log(),
        )


def _summed(head: _TiledHead, picks: _Picks, origin_N: Tensor) -> _Sums:
    tokens = len(origin_N)
    picked, rest_N, moment_N = (origin_N.new_zeros(size) for size in (len(picks.order), tokens, tokens))
    memory_WN = origin_N.new_empty(head.width, tokens)
    of_tiles = zip(torch.split(picks.places, picks.sizes), torch.split(picked, picks.sizes), strict=True)

    def read(tile_WN: Tensor) -> None:
        places, mine = next(of_tiles)
        exp_WN = torch.exp2(tile_WN, out=memory_WN[: len(tile_WN)])
        torch.index_select(tile_WN.view(-1), 0, places, out=mine)
        if head.bias_V is not None:
            tile_WN.clamp_(min=_FINITE)  # a logit of -inf has weight 0 and counts as 0
        moment_N.add_(tile_WN.mul_(exp_WN).sum(0))
        exp_WN.view(-1).index_fill_(0, places, 0.0)
        rest_N.add_(exp_WN.sum(0))

    head.read_tiles(origin_N, read)
    assert next(of_tiles, None) is None  # noqa: S101 - every tile was read
    picked_NL = torch.empty_like(picked).index_copy_(0, picks.order, picked).view(tokens, -1)
    return _Sums(origin_N, picked_NL, rest_N, moment_N)
