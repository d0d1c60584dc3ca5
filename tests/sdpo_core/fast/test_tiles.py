"""Statistics by tiles of the vocabulary against those of whole rows of logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core.fast import tiles
from sdpo_core.fast.rows import RowStats, row_stats
from sdpo_core.fast.tiles import head_stats

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs of several tiles for a small vocabulary."""
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 1)
    monkeypatch.setattr(tiles, "SLAB_TILES", 2)
    monkeypatch.setattr(tiles, "_LEAST_WIDTH", 16)


def inputs(n: int, v: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    hidden_NH, weight_VH = (torch.randn(rows, 12, generator=g).to(dtype) * 2 for rows in (n, v))
    index_NK = torch.argsort(torch.rand(n, v, generator=g), dim=-1)[:, :k]
    return hidden_NH, weight_VH, torch.randn(v, generator=g).to(dtype), index_NK, torch.randint(0, v, (n,), generator=g)


def compare(given: Inputs, tolerance: float) -> None:
    hidden_NH, weight_VH, bias_V, index_NK, ids_N = given
    found = head_stats(hidden_NH, weight_VH, bias_V, index_NK, ids_N)
    expected = row_stats(torch.nn.functional.linear(hidden_NH, weight_VH, bias_V), index_NK, ids_N)
    torch.testing.assert_close(found.entropy_N, expected.entropy_N, rtol=tolerance, atol=tolerance)
    for name in ("lse_N", "picked_NK", "chosen_N", "rest_N"):
        ours, theirs = whole(found, name), whole(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def whole(stats: RowStats, name: str) -> Tensor:
    """Counted from 0 instead of the row's origin."""
    value: Tensor = getattr(stats, name)
    return value + stats.top_N.view(-1, *[1] * (value.dim() - 1))


@settings(deadline=None)
@given(n=st.integers(1, 9), v=st.integers(2, 90), k=st.integers(0, 9), seed=st.integers(0, 9999))
def test_equals_whole_rows(n: int, v: int, k: int, seed: int) -> None:
    """Vocabularies that are no multiple of a tile, kept tokens anywhere."""
    compare(inputs(n, v, min(k, v - 1), seed), 1e-10)


@pytest.mark.parametrize(("lowest", "readings"), [(-2.0, 1), (-40.0, 1), (-120.0, 3)])
def test_float32_far_from_the_origin(monkeypatch: pytest.MonkeyPatch, lowest: float, readings: int) -> None:
    """Beyond e^88 sums overflow: then the largest logits are looked for and all is summed once more."""
    made, read_tiles = [], tiles._TiledHead.read_tiles

    def counted(head: tiles._TiledHead, origin_N: Tensor, read: Callable[[Tensor], None]) -> None:
        made.append(head)
        read_tiles(head, origin_N, read)

    monkeypatch.setattr(tiles._TiledHead, "read_tiles", counted)
    hidden_NH, weight_VH, _, _, _ = inputs(5, 80, 7, dtype=torch.float32)
    index_NK, ids_N = torch.arange(7).expand(5, 7), torch.arange(5)  # the origin is one of the lowest
    compare((hidden_NH * 0.1, weight_VH, torch.linspace(lowest, -lowest, 80), index_NK, ids_N), 2e-5)
    assert len(made) == readings


@pytest.mark.parametrize("onednn", [tiles.ONEDNN, False])
def test_both_products(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """Matrices that do not lie row by row as well."""
    monkeypatch.setattr(tiles, "ONEDNN", onednn)
    hidden_NH, weight_VH, bias_V, index_NK, ids_N = inputs(7, 77, 5, dtype=torch.float32)
    compare((hidden_NH, weight_VH, bias_V, index_NK, ids_N), 2e-5)
    compare((hidden_NH.T.contiguous().T, weight_VH.T.contiguous().T, bias_V, index_NK, ids_N), 2e-5)
    compare((hidden_NH[:, ::2], weight_VH[:, ::2], bias_V, index_NK, ids_N), 2e-5)


def test_forbidden_tokens_and_a_forbidden_tile() -> None:
    hidden_NH, weight_VH, bias_V, index_NK, ids_N = inputs(4, 64, 5)
    bias_V[:20] = -torch.inf
    bias_V[40] = -torch.inf
    compare((hidden_NH, weight_VH, bias_V, index_NK, ids_N), 1e-10)


def test_nothing_is_left_outside() -> None:
    hidden_NH, weight_VH, bias_V, _, ids_N = inputs(3, 20, 1)
    compare((hidden_NH, weight_VH, bias_V, torch.arange(20).expand(3, 20).contiguous(), ids_N), 1e-10)
