"""The key/value cache of a batch whose rows come and go.

Row s of the cache is slot s; slots 0..n-1 are the running requests, so that a forward over them is a view and not a
copy. Token p of a request lies at position p of its slot; there is no padding in the cache. A freed slot is zeroed:
masked positions still enter the attention with weight 0, and 0 * NaN is NaN.

Shapes: S slots, H key/value heads, C capacity in tokens, D head size, B rows and T tokens of one forward,
N valid tokens among them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class WritePlan:
    """Where the tokens of one forward go: the slots are first_slot .. first_slot + B - 1.

    Token n of the N valid ones goes to position `positions[n]` of slot `slots[n]`; `valid` (B, T) picks them out of the
    padded batch and is None when no token is padding. `window` is the number of key positions that attention sees.
    """

    first_slot: int
    rows: int
    window: int
    slots: Tensor
    positions: Tensor
    valid: Tensor | None


class SlotCache(Cache):  # type: ignore[misc]  # Transformers is untyped here
    """Keys and values of up to `slots` requests, grown by doubling up to `max_length` tokens each."""

    def __init__(self, slots: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.max_length = max_length
        self.capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._plan: WritePlan | None = None

    def begin(self, plan: WritePlan) -> None:
        """Announce the forward that comes next; makes room for it."""
        if plan.window > self.capacity:
            doubled = max(_FIRST_CAPACITY, 2 * self.capacity, plan.window)
            self.capacity = min(self.max_length, doubled)
            self._keys = [_grown(tensor, self.capacity) for tensor in self._keys]
            self._values = [_grown(tensor, self.capacity) for tensor in self._values]
        self._plan = plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store the new (B, H, T, D) states, return (B, H, window, D) views."""
        plan = self._plan
        assert plan is not None, "begin() announces every forward"  # noqa: S101
        if layer_idx == len(self._keys):
            self._keys.append(self._empty(key_states))
            self._values.append(self._empty(value_states))
        return (
            _store(self._keys[layer_idx], key_states, plan),
            _store(self._values[layer_idx], value_states, plan),
        )

    def release(self, slot: int, last: int) -> None:
        """Free `slot` by moving slot `last` (the highest in use) into it; `last` is zeroed."""
        for tensor in (*self._keys, *self._values):
            if slot != last:
                tensor[slot] = tensor[last]
            tensor[last].zero_()

    def clear(self) -> None:
        """Drop everything, memory included."""
        self._keys, self._values, self.capacity, self._plan = [], [], 0, None

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Unused: positions and masks are always passed in. Rows have different lengths."""
        return 0

    def _empty(self, like_BHTD: Tensor) -> Tensor:
        _, heads, _, size = like_BHTD.shape
        return like_BHTD.new_zeros(self.slots, heads, self.capacity, size)


def _grown(tensor_SHCD: Tensor, capacity: int) -> Tensor:
    slots, heads, old, size = tensor_SHCD.shape
    grown = tensor_SHCD.new_zeros(slots, heads, capacity, size)
    grown[:, :, :old] = tensor_SHCD
    return grown


def _store(cache_SHCD: Tensor, states_BHTD: Tensor, plan: WritePlan) -> Tensor:
    states_BTHD = states_BHTD.transpose(1, 2)
    new_NHD = states_BTHD.flatten(0, 1) if plan.valid is None else states_BTHD[plan.valid]
    cache_SHCD[plan.slots, :, plan.positions] = new_NHD
    return cache_SHCD[plan.first_slot : plan.first_slot + plan.rows, :, : plan.window]


def make_plan(first_slot: int, counts: list[int], past: list[int], device: torch.device) -> tuple[WritePlan, Tensor]:
    """The plan of a forward that feeds `counts[b]` new tokens to row b after its `past[b]` tokens.

    Rows are padded on the left to the longest, so that the last column holds the last token of every row. Also returns
    positions_BT; those of padding are below `past[b]` and may be negative.
    """
    width = max(counts)
    counts_B, past_B = torch.tensor(counts), torch.tensor(past)
    positions_BT = torch.arange(width)[None] - (width - counts_B - past_B)[:, None]
    slots_BT = (torch.arange(len(counts)) + first_slot)[:, None].expand_as(positions_BT)
    valid_BT = positions_BT >= past_B[:, None]
    padded = min(counts) < width
    plan = WritePlan(
        first_slot=first_slot,
        rows=len(counts),
        window=max(count + before for count, before in zip(counts, past, strict=True)),
        slots=slots_BT[valid_BT].to(device),
        positions=positions_BT[valid_BT].to(device),
        valid=valid_BT.to(device) if padded else None,
    )
    return plan, positions_BT.to(device)
