"""`row_stats` and `row_grad_` of sdpo_core.fast.rows as GPU kernels: the same arguments, the same results.

Each reads the logits once, whatever K is, where the torch version reads or writes something as wide as the vocabulary
five to eight times. Both round only once, to the logits' dtype at the end. `bytes_of_stats` and `bytes_of_grad` say
what must be moved at least, so that a time can be held against the memory's rate.

Imports without triton (`usable` is then false); the kernels are compiled at the first call. On a CPU they run in
triton's interpreter, TRITON_INTERPRET=1 set before the first call: that is what the tests do.

Shape legend as in rows.py: N tokens, V vocabulary, K kept tokens, distinct within a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_core.fast import rows as torch_rows
from sdpo_core.fast.rows import RowStats

log = logging.getLogger(__name__)
_BLOCK_V = 4096
_WARPS = 8
_DTYPES = (torch.float32, torch.bfloat16)


def usable(logits: Tensor) -> bool:
    """Whether the kernels take these logits: on an NVIDIA GPU, float32 or bfloat16, with a triton that works."""
    return logits.is_cuda and logits.dtype in _DTYPES and find_spec("triton") is not None and works()


@cache
def works() -> bool:
    """Whether triton can build and load what it talks to the GPU with. It needs a C compiler for that, once; if not,
    the torch versions run, and the log says why."""
    try:
        from triton.runtime import driver

        _ = driver.active.utils
    except Exception as error:
        log.warning("kernels of torch in the place of triton's: %s: %s", type(error).__name__, error)
        return False
    return True


@torch.no_grad()
def row_stats(logits_NV: Tensor, index_NK: Tensor, ids_N: Tensor) -> RowStats:
    """rows.row_stats. While it runs the kept logits are out of place; afterwards every bit is where it was."""
    from sdpo_core.fast import kernels

    rows, vocabulary, kept = _sizes(logits_NV, index_NK)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits_NV.device)

    stats = RowStats(
        top_N=empty(rows), lse_N=empty(rows), picked_NK=empty(rows, kept), chosen_N=empty(rows),
        entropy_N=empty(rows), rest_N=empty(rows),
    )  # fmt: skip
    if rows:
        kernels.row_stats_kernel[(rows,)](
            logits_NV, index_NK.contiguous(), ids_N.contiguous(),
            stats.top_N, stats.lse_N, stats.picked_NK, stats.chosen_N, stats.entropy_N, stats.rest_N,
            logits_NV.stride(0), vocabulary, kept,
            BLOCK_V=_block(vocabulary), BLOCK_K=_power_of_two(kept), num_warps=_WARPS,
        )  # fmt: skip
    return stats


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
    """rows.row_grad_: in place."""
    from sdpo_core.fast import kernels

    rows, vocabulary, kept = _sizes(logits_NV, index_NK)
    if rows:
        kernels.row_grad_kernel[(rows,)](
            logits_NV, *(x.float().contiguous() for x in (origin_N, spread_N)),
            index_NK.contiguous(), at_index_NK.float().contiguous(), ids_N.contiguous(),
            at_chosen_N.float().contiguous(), logits_NV.stride(0), vocabulary, kept,
            BLOCK_V=_block(vocabulary), BLOCK_K=_power_of_two(kept), num_warps=_WARPS,
        )  # fmt: skip
    return logits_NV


def bytes_of_stats(logits_NV: Tensor, kept: int) -> int:
    """Least traffic of `row_stats`: the logits once; per row K indices read, K logits read, stored, put back, and
    written out as float32; five numbers out and the token in."""
    rows, vocabulary = logits_NV.shape
    size = logits_NV.element_size()
    return rows * (vocabulary * size + kept * (8 + 3 * size + 4) + 8 + size + 5 * 4)


def bytes_of_grad(logits_NV: Tensor, kept: int) -> int:
    """Least traffic of `row_grad_`: the logits once in and once out; per row K indices, K values in and out."""
    rows, vocabulary = logits_NV.shape
    size = logits_NV.element_size()
    return rows * (2 * vocabulary * size + kept * (8 + 4 + size) + 8 + 2 * size + 3 * 4)


class RowKernels(NamedTuple):
    """One of the two implementations."""

    row_stats: Callable[[Tensor, Tensor, Tensor], RowStats]
    row_grad_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def rows_for(logits: Tensor) -> RowKernels:
    """The kernels where they are usable, the torch versions elsewhere."""
    if usable(logits):
        return RowKernels(row_stats, row_grad_)
    return RowKernels(torch_rows.row_stats, torch_rows.row_grad_)


def _sizes(logits_NV: Tensor, index_NK: Tensor) -> tuple[int, int, int]:
    if logits_NV.dtype not in _DTYPES:
        raise TypeError(f"the kernels take float32 or bfloat16 logits, not {logits_NV.dtype}")
    if logits_NV.numel() and logits_NV.shape[1] > 1 and logits_NV.stride(1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    return logits_NV.shape[0], logits_NV.shape[1], index_NK.shape[1]


def _block(vocabulary: int) -> int:
    return min(_BLOCK_V, _power_of_two(vocabulary))


def _power_of_two(size: int) -> int:
    return max(2, 1 << (max(size, 1) - 1).bit_length())
