# ruff: noqa: N815 - shape suffixes on fields
"""What is scored through the output head without gradient, a chunk of tokens at a time.

Shape legend: N response tokens of a micro-batch, H hidden width, V vocabulary. The logits of one chunk are the only
thing as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.fast.records import joined
from sdpo_core.fast.rows_triton import rows_for
from sdpo_core.fast.whole_rows import kept, with_states

R = TypeVar("R")
CHUNK_ENTRIES = 1 << 23
"""Logits of a chunk when nobody says how many: 32 MB in float32."""
LEAST_CHUNK = 16


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk by default."""
    return max(LEAST_CHUNK, CHUNK_ENTRIES // vocabulary)


@dataclass(frozen=True)
class Head:
    """The frozen output layer."""

    weight_VH: Tensor
    bias_V: Tensor | None = None

    @torch.no_grad()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        return functional.linear(hidden_NH, self.weight_VH, self.bias_V)


def chunks(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each; one of no tokens for none."""
    for start in range(0, max(tokens, 1), size):
        yield start, min(size, tokens - start)


@torch.no_grad()
def scored(
    logits: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    ids_N: Tensor,
    size: int,
    keep: Callable[[Tensor, Tensor], R],
) -> R:
    """`keep(logits, ids)` of every chunk, joined: for everything that is scored without gradient."""
    parts = [
        keep(logits(hidden_NH.narrow(0, start, length)), ids_N.narrow(0, start, length))
        for start, length in chunks(len(ids_N), size)
    ]
    return joined(parts)


def response_logp(logits_NV: Tensor, ids_N: Tensor) -> Target:
    """Log-probs of the response tokens of a chunk, as a record with `logp` (N,)."""
    stats = rows_for(logits_NV).row_stats(logits_NV, ids_N.new_empty(len(ids_N), 0), ids_N)
    return Target((stats.chosen_N - stats.lse_N).clamp(min=dv.LOGP_FLOOR))


def kept_teacher(head: Head, states_NH: Tensor, ids_N: Tensor, spec: DivergenceSpec, size: int) -> Target:
    """`divergence.teacher_target` from hidden states: no copy of a chunk's logits, and no whole row is kept."""

    def keep(logits_NV: Tensor, ids_N: Tensor) -> Target:
        if spec.support == "sampled":
            return dv.teacher_target(logits_NV, ids_N, spec)
        top_k = spec.top_k if spec.support == "teacher" else dv.GAP.top_k
        target = kept(logits_NV, dv.top_k_indices(logits_NV, top_k), ids_N)
        if spec.support != "teacher" or dv.keeps_gap(spec):
            return target
        return replace(target, gap=kept(logits_NV, dv.top_k_indices(logits_NV, dv.GAP.top_k), ids_N))

    found = scored(head.logits, states_NH, ids_N, size, keep)
    return with_states(found, states_NH) if spec.support in ("student", "full") else found
