"""Which model a base is: what it answers, and sums over the bits of every weight it holds.

Taken when an adapter is attached and again after each batch. Version counters of tensors would be cheaper and are no
proof: `weight.data.add_(...)` leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_WORD = 8
"""Bytes of a word."""
_ROW = 1024
"""Words of a row, for sums that a change of places does not leave as they are."""


@dataclass(frozen=True, eq=False)
class BaseSeal:
    """What `seal_of` saw."""

    answers: Tensor
    """Logits after each of a few fixed tokens, (7, V), fewer where window or vocabulary are smaller."""
    names: tuple[str, ...]
    """Of every weight, with its shape and type."""
    sums: Tensor
    """(weights, 2): int64 sums of a weight's words, by columns and by rows, each with an odd factor of its own."""

    def same(self, other: BaseSeal) -> bool:
        """To the bit. Of weights no change of a single one goes unseen."""
        if self.names != other.names or self.answers.shape != other.answers.shape:
            return False
        return torch.equal(self.sums, other.sums.to(self.sums.device)) and torch.equal(
            self.answers, other.answers.to(self.answers.device)
        )


@torch.no_grad()
def seal_of(model: nn.Module) -> BaseSeal:
    """The model as it is, an adapter's own factors left out; it must be switched off where there is one.

    Weights are parameters and the buffers that are saved with them. Each is read once: as long as a copy takes.
    """
    device = next(model.parameters()).device
    length = min(7, vocabulary_of(model), window_of(model) or 7)
    logits: Tensor = model.eval()(input_ids=torch.arange(length, device=device).unsqueeze(0), use_cache=False).logits
    weights = list(_weights(model))
    names = tuple(f"{name} {tuple(weight.shape)} {weight.dtype}" for name, weight in weights)
    sums = [_sums(weight).to(device) for _, weight in weights]
    return BaseSeal(logits[0].clone(), names, torch.stack(sums))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By the names they have without an adapter; of tied ones the first."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if ".lora_" in f".{prefix}":
            continue
        lost = module._non_persistent_buffers_set
        held = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if n not in lost)]
        for name, weight in held:
            if weight is None or id(weight) in seen or "lora_" in name:
                continue
            seen.add(id(weight))
            yield f"{prefix}.{name}".replace(".base_layer.", "."), weight.detach()


def _sums(weight: Tensor) -> Tensor:
    """(2,). Wraps at 2**64: the change of one word by d changes a sum by d times an odd number, which is never 0."""
    if isinstance(weight, DTensor):  # this rank's part of it
        weight = weight.to_local()
    if weight.device.type == "meta":  # lies elsewhere, and is fetched layer by layer
        return torch.zeros(2, dtype=torch.int64)
    raw = weight.contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // (_WORD * _ROW) * (_WORD * _ROW)
    rest = raw.new_zeros(_WORD * _ROW)
    rest[: raw.numel() - whole] = raw[whole:]
    found = _of_rows(rest.view(torch.int64).view(1, _ROW))
    return found + _of_rows(raw[:whole].view(torch.int64).view(-1, _ROW)) if whole else found


def _of_rows(words_RC: Tensor) -> Tensor:
    by_column_C, by_row_R = words_RC.sum(0), words_RC.sum(1)
    return torch.stack([(by_column_C * _odd(by_column_C)).sum(), (by_row_R * _odd(by_row_R)).sum()])


def _odd(like_N: Tensor) -> Tensor:
    return 2 * torch.arange(like_N.numel(), device=like_N.device) + 1


def window_of(model: nn.Module) -> int | None:
    """`max_position_embeddings` of a Transformers model's configuration, by whatever name it has it."""
    window = getattr(_text_config(model), "max_position_embeddings", None)
    return window if isinstance(window, int) and window > 0 else None


def vocabulary_of(model: nn.Module) -> int:
    """Entries of its vocabulary."""
    return int(_text_config(model).vocab_size)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()
