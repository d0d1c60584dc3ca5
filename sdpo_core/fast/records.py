"""Frozen dataclasses of tensors whose first dimension is tokens: several joined, one cut up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def joined(records: Sequence[R]) -> R:
    """Concatenate field by field. Fields are tensors, None, or records again, alike in all of them."""
    return _mapped(records, lambda tensors: torch.cat(list(tensors)))


def narrowed(record: R, start: int, length: int) -> R:
    """The same record of `length` tokens from `start` on."""
    return _mapped([record], lambda tensors: tensors[0][start : start + length])


def split(record: R, lengths: Sequence[int]) -> list[R]:
    """One record per length, copied so that none keeps the whole alive."""
    starts = accumulate((0, *lengths[:-1]))
    return [
        _mapped([narrowed(record, f, n)], lambda tensors: tensors[0].clone())
        for f, n in zip(starts, lengths, strict=True)
    ]


def _mapped(records: Sequence[R], change: Callable[[list[Tensor]], Tensor]) -> R:
    kind: Any = type(records[0])
    changed: R = kind(**{f.name: _field([getattr(r, f.name) for r in records], change) for f in fields(kind)})
    return changed


def _field(values: list[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    if values[0] is None:
        return None
    return _mapped(values, change) if is_dataclass(values[0]) else change(values)
