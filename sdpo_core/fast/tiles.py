"""`rows.row_stats` straight from hidden states: the head's rows (the vocabulary) a slice at a time, all tokens at once.

A tile of logits is made, read and forgotten while it is in the processor's cache, and the head's weights are read once
per block of tokens instead of once per chunk. Logits of a whole row never exist, so this serves losses whose gradient
lives on the kept tokens alone. For CPUs: on a GPU hundreds of small kernels would take longer than the products.

Shape legend: N tokens of a block, H hidden width, V vocabulary, K kept tokens, W width of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    """The statistics of the rows `hidden weight' + bias`, in one pass with a running maximum."""
    tokens, vocabulary = len(ids_N), len(weight_VH)
    width = min(vocabulary, max(_LEAST_WIDTH, TILE_ENTRIES // max(tokens, 1)))
    kept, chosen = _Places(index_NK, vocabulary, width), _Places(ids_N.unsqueeze(-1), vocabulary, width)
    sums = _Sums(tokens, weight_VH)
    for number, logits_NW in enumerate(_tiles(hidden_NH, weight_VH, bias_V, width, sums.dtype)):
        places = kept.read(number, logits_NW)
        chosen.read(number, logits_NW)
        sums.add_(logits_NW, places)
    return sums.stats(kept.values, chosen.values.squeeze(-1))


def _tiles(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, width: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """(N, W) logits of one slice of the vocabulary after the other; each is overwritten by the next."""
    memory = hidden_NH.new_empty(len(hidden_NH) * width)
    for start in range(0, len(weight_VH), width):
        part_WH = weight_VH[start : start + width]
        tile_NW = memory[: len(hidden_NH) * len(part_WH)].view(len(hidden_NH), len(part_WH))
        torch.mm(hidden_NH, part_WH.T, out=tile_NW)
        if bias_V is not None:
            tile_NW += bias_V[start : start + width]
        yield tile_NW.to(dtype)


class _Places:
    """Tokens whose logits are wanted, (N, K) of the vocabulary, sorted by the tile that they are in."""

    def __init__(self, index_NK: Tensor, vocabulary: int, width: int) -> None:
        self.width = width
        self.columns, self.order = index_NK.flatten().sort()
        self.rows = self.order // max(index_NK.shape[-1], 1)
        edges = torch.arange(0, vocabulary + width, width, device=index_NK.device)
        self.bounds: list[int] = torch.searchsorted(self.columns, edges).tolist()
        self.found: Tensor | None = None
        self.shape = index_NK.shape

    def read(self, number: int, logits_NW: Tensor) -> Tensor:
        """Read those in this tile, and say where in the flattened tile they are."""
        if self.found is None:
            self.found = logits_NW.new_empty(self.order.numel())
        mine = slice(self.bounds[number], self.bounds[number + 1])
        places = self.rows[mine] * logits_NW.shape[-1] + (self.columns[mine] - number * self.width)
        self.found[self.order[mine]] = logits_NW.view(-1)[places]
        return places

    @property
    def values(self) -> Tensor:
        assert self.found is not None  # noqa: S101 - there is a tile at least
        return self.found.view(self.shape)


class _Sums:
    """Running sums over the tiles, each relative to the largest logit so far."""

    def __init__(self, tokens: int, like: Tensor) -> None:
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.top_N1 = like.new_full((tokens, 1), _FINITE, dtype=self.dtype)
        self.rest_N = like.new_zeros(tokens, dtype=self.dtype)
        self.inner_N = torch.zeros_like(self.rest_N)

    def add_(self, logits_NW: Tensor, kept: Tensor) -> None:
        """`kept`: places of the tile, flat, that the rest does not count. Overwrites the tile."""
        top_N1 = torch.maximum(self.top_N1, logits_NW.amax(-1, keepdim=True))
        scale_N = (self.top_N1 - top_N1).exp_().squeeze(-1)
        exp_NW = (logits_NW - top_N1).exp_()
        inner_N = _dot_(logits_NW, exp_NW)
        exp_NW.view(-1).index_fill_(0, kept, 0.0)
        self.rest_N.mul_(scale_N).add_(exp_NW.sum(-1))
        self.inner_N.mul_(scale_N).add_(inner_N)
        self.top_N1 = top_N1

    def stats(self, picked_NK: Tensor, chosen_N: Tensor) -> RowStats:
        top_N, picked_NK = self.top_N1.squeeze(-1), picked_NK - self.top_N1
        whole_N = self.rest_N + picked_NK.exp().sum(-1)
        lse_N = whole_N.log()
        return RowStats(
            top_N=top_N,
            lse_N=lse_N,
            picked_NK=picked_NK,
            chosen_N=chosen_N - top_N,
            entropy_N=(lse_N + top_N - self.inner_N / whole_N).clamp(min=0.0),
            rest_N=self.rest_N.log(),
        )


def _dot_(logits_NW: Tensor, exp_NW: Tensor) -> Tensor:
    """Row by row, overwriting the logits; one of -inf has weight 0 and counts as 0."""
    inner_N = logits_NW.mul_(exp_NW).sum(-1)
    if bool(inner_N.sum().isnan()):
        inner_N = logits_NW.nan_to_num_(nan=0.0).sum(-1)
    return inner_N
