"""What the files of an adapter hold, in memory: so that whoever trained it can go on without reading them.

Bit for bit what was written: float32 stays float32, bfloat16 stays bfloat16. Nobody writes into these tensors; those
who load them copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SavedLora:
    """An adapter as `save_lora` writes it."""

    config: Mapping[str, Any]
    """Of adapter_config.json."""
    weights: Mapping[str, Tensor]
    """Of adapter_model.safetensors, on the CPU."""

    @property
    def nbytes(self) -> int:
        return size_of(self.weights.values())


@dataclass(frozen=True)
class SavedMoments:
    """The state of AdamW as `save_optimizer` writes it."""

    steps: Mapping[str, int]
    """By parameter."""
    tensors: Mapping[str, Tensor]
    """By `<moment>.<parameter>`, on the CPU."""

    @property
    def nbytes(self) -> int:
        return size_of(self.tensors.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their values."""
    return sum(t.numel() * t.element_size() for t in tensors)
