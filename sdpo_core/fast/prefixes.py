"""Texts that begin as others did, read without reading the beginning again.

A remark stands at the end of a conversation, so what a teacher is told in two ways is the same for most of its length.
What attention keeps of the first text (keys and values of every layer) is put in front of the second one's rest.

Shape legend: P tokens of the packed rests, N their response tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdpo_core.fast.decoder import hidden_states
from sdpo_core.fast.packing import PackedBatch, attention_arguments, pack
from sdpo_core.fast.windows import has_window

PREFIXED = "perennial_prefixed"
"""Our attention's name with Transformers."""
KeysValues = tuple[Tensor, Tensor]
"""(1, heads, tokens, width) each."""


@dataclass
class Read:
    """Several texts that were read, prompts and responses."""

    rows: list[tuple[int, ...]]
    """Their tokens."""
    layers: dict[int, list[KeysValues]] = field(default_factory=dict)
    """Of each layer, by row."""

    def common(self, row: int, prompt: Sequence[int]) -> int:
        """First tokens of a prompt that were read in this row, its last one left out: something must be asked anew."""
        most = min(len(prompt) - 1, len(self.rows[row]))
        return next((i for i in range(most) if self.rows[row][i] != prompt[i]), most)


@runtime_checkable
class PrefixReader(Protocol):
    """A policy that reads on from where an earlier text parts from a new one."""

    @property
    def reads_on(self) -> bool:
        """Whether its model can."""
        ...

    def read(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], known: Read | None
    ) -> tuple[list[Tensor], Read]:
        """The base's logits that predict each response, (T, V) per row, and what was read. `known`: texts that were
        read before, row for row."""
        ...


@dataclass
class _Memory:
    """What one pass is given and what it leaves."""

    known: Read | None
    cuts: list[int]
    """Tokens in front of each row that are known."""
    made: dict[int, list[KeysValues]] = field(default_factory=dict)

    def joined(self, layer: int, row: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Known keys and values in front of new ones; kept."""
        if self.known is not None and (cut := self.cuts[row]):
            before = self.known.layers[layer][row]
            keys, values = (
                torch.cat([old[:, :, :cut], new], dim=2) for old, new in zip(before, (keys, values), strict=True)
            )
        self.made.setdefault(layer, []).append((keys, values))
        return keys, values


@torch.no_grad()
def read_behind(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], known: Read | None
) -> tuple[Tensor, Read]:
    """The decoder's output at the positions that predict the responses, (N, H), as `decoder.hidden_states` gives it up
    to rounding, and what was read."""
    rows = [(*p, *r) for p, r in zip(prompts, responses, strict=True)]
    cuts = [0 if known is None else known.common(row, prompt) for row, prompt in enumerate(prompts)]
    batch = pack([p[cut:] for p, cut in zip(prompts, cuts, strict=True)], responses, model.device)
    batch = replace(batch, positions_P=_positions(batch, cuts))
    memory = _Memory(known, cuts)
    decoder: Any = model.base_model
    with _prefixed_attention(model):
        out = decoder(
            input_ids=batch.ids_P.unsqueeze(0), position_ids=batch.positions_P.unsqueeze(0), use_cache=False,
            memory=memory, **attention_arguments(batch),
        )  # fmt: skip
    states_PH: Tensor = out.last_hidden_state[0]
    return states_PH.index_select(0, batch.predicts_N), Read(rows, memory.made)


@torch.no_grad()
def reads_on(model: PreTrainedModel) -> bool:
    """Whether reading behind a beginning gives what reading the whole gives: tried on a few tokens, two texts at once.
    Call for a model that can be packed (`decoder.obstacle_in`); layers with a window see less and say no."""
    if has_window(model):
        return False
    prompts, others, responses = [(0, 1, 2, 3), (3, 1)], [(0, 1, 4, 2), (3, 1)], [(1, 2), (4,)]
    try:
        _, known = read_behind(model, prompts, responses, None)
        behind_NH, _ = read_behind(model, others, responses, known)
        whole_NH = hidden_states(model, pack(others, responses, model.device))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if whole_NH.dtype == torch.float32 else 5e-2
    return bool((behind_NH.float() - whole_NH.float()).norm() <= tolerance * whole_NH.float().norm())


def _positions(batch: PackedBatch, cuts: Sequence[int]) -> Tensor:
    """(P,): each within its whole text."""
    sizes = [end - start for start, end in zip(batch.starts, batch.ends, strict=True)]
    device = batch.ids_P.device
    return batch.positions_P + torch.tensor(cuts, device=device).repeat_interleave(torch.tensor(sizes, device=device))


@contextmanager
def _prefixed_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(PREFIXED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    memory: _Memory,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of (1, heads, P, width) tensors, one sequence at a time, each behind what is known of it; gives
    (1, P, heads, width)."""
    if attention_mask is not None or sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention behind a prefix knows no mask, window, soft cap or sink")
    outputs, start = [], 0
    for row, end in enumerate(packed.ends):
        k, v = memory.joined(module.layer_idx, row, key[:, :, start:end], value[:, :, start:end])
        mask = _triangle(end - start, k.shape[2], query.device)
        attended = sdpa_attention_forward(
            module, query[:, :, start:end], k, v, mask, is_causal=mask is None, **others
        )  # fmt: skip
        outputs.append(attended[0])
        start = end
    return torch.cat(outputs, dim=1), None


def _triangle(asked: int, seen: int, device: torch.device) -> Tensor | None:
    """(1, 1, asked, seen): the last `asked` rows of the causal triangle; None where it is the whole of it."""
    if asked == seen:
        return None
    return torch.ones(asked, seen, dtype=torch.bool, device=device).tril(seen - asked)[None, None]


AttentionInterface.register(PREFIXED, _attend)
