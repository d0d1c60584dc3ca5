# ruff: noqa: N815 - shape suffixes on fields
"""Sequences laid end to end, without padding, and attention that keeps them apart.

Shape legend: S sequences, P all their tokens, N their response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

PACKED = "perennial_packed"
"""Our attention's name with Transformers."""


@dataclass(frozen=True)
class PackedBatch:
    """Prompts and responses of several samples in one row."""

    ids_P: Tensor
    positions_P: Tensor
    """Position within its own sequence."""
    ends: tuple[int, ...]
    """Where each sequence ends, in tokens of the row."""
    predicts_N: Tensor
    """Where in the row the token before each response token stands."""
    response_ids_N: Tensor
    response_lengths: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device) -> PackedBatch:
    """Each prompt with its response behind it."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    ends = tuple(accumulate(lengths))
    predicts = [end - len(r) - 1 + t for end, r in zip(ends, responses, strict=True) for t in range(len(r))]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    return PackedBatch(
        ids_P=tensor([i for p, r in zip(prompts, responses, strict=True) for i in (*p, *r)]),
        positions_P=tensor([i for n in lengths for i in range(n)]),
        ends=ends,
        predicts_N=tensor(predicts),
        response_ids_N=tensor([i for r in responses for i in r]),
        response_lengths=tuple(len(r) for r in responses),
    )


def packed_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut row numbers, in order, into groups of at most `budget` tokens; a longer row has a group of its own."""
    groups: list[list[int]] = []
    filled = 0
    for row, length in enumerate(lengths):
        if groups and filled + length <= budget:
            groups[-1].append(row)
            filled += length
        else:
            groups.append([row])
            filled = length
    return groups


def attention_arguments(batch: PackedBatch) -> dict[str, Any]:
    """How Transformers' attention functions are told where the sequences end (its names)."""
    bounds = torch.tensor((0, *batch.ends), dtype=torch.int32, device=batch.ids_P.device)
    longest = max(end - start for start, end in zip(batch.starts, batch.ends, strict=True))
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
        "packed": batch,
    }  # fmt: skip


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend within packed sequences only, for the length of a `with` block.

    FlashAttention's variable-length kernel where it is installed and the model is on a GPU in half precision; else
    `per_sequence`, which leaves out everything outside the sequences' own triangles as well.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("flash_attention_2" if _flash(model) else PACKED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _flash(model: PreTrainedModel) -> bool:
    half = model.dtype in (torch.float16, torch.bfloat16)
    return model.device.type == "cuda" and half and is_flash_attn_2_available()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of (1, heads, P, width) tensors, one sequence at a time; gives (1, P, heads, width)."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention knows no mask, soft cap or sink")
    outputs, start = [], 0
    for end in packed.ends:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = _band(end - start, sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **others)[0])
        start = end
    return torch.cat(outputs, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(1, 1, length, length): the causal band of a sliding window; None where the plain triangle is the same."""
    if window is None or length <= window:
        return None
    i = torch.arange(length, device=device)
    distance = i.unsqueeze(1) - i.unsqueeze(0)
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(PACKED, per_sequence)
