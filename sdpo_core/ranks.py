"""One batch shared by several processes ("ranks") that hold the same adapter: who takes which answers, and what is
brought together again.

Each rank runs its share of the answers forward and backward with the WHOLE batch's weights and denominators, so the
batch's gradient is the sum of the ranks' gradients, not their mean, and one sum per step makes it equal to that of a
lone process up to the order of additions. From there on (clip, update, decision) all ranks compute the same.

This is what DDP does, written out. Its wrapper does not fit: it owns the forward pass (the fast path has its own),
averages where a sum is meant, and reduces at every backward unless told which micro-batch is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from sdpo_core.report import Sums

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another process of those that train together is gone. The adapter may have been trained in part: drop it."""


class Ranks(Protocol):
    """What a rank needs of the others. Every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """From 0."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def lockstep(self) -> bool:
        """Whether forward passes are common acts too, because each rank holds a part of the base only."""
        ...

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in order of rank. Tensors come back on the CPU."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over all ranks into each `.grad`; None where no rank has one."""
        ...


class Lone:
    """One process with nobody beside it: nothing is shared, no bit changes."""

    rank = 0
    size = 1
    lockstep = False

    def gathered(self, value: T) -> list[T]:
        return [value]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        del parameters  # they hold the whole batch's gradient already


LONE = Lone()


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers of each rank, ascending: longest first, each to the rank with the fewest tokens so far."""
    rows: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        least = load.index(min(load))
        rows[least].append(row)
        load[least] += lengths[row]
    return [sorted(r) for r in rows]


def any_rank(ranks: Ranks, here: bool) -> bool:
    """Whether it is so on one rank at least: the same answer on all of them."""
    return any(ranks.gathered(here))


def from_first(ranks: Ranks, value: T) -> T:
    """The first rank's value, everywhere."""
    return ranks.gathered(value if ranks.rank == 0 else cast(T, None))[0]


def merged(ranks: Ranks, found: dict[int, T], device: torch.device) -> list[T]:
    """What each rank has found for rows of its own, brought together: in order of row, on `device`."""
    if ranks.size == 1:
        return [found[row] for row in sorted(found)]
    everything: dict[int, T] = {}
    for part in ranks.gathered(found):
        everything.update(part)
    return [moved(everything[row], device) for row in sorted(everything)]


def moved(value: T, device: torch.device) -> T:
    """The same with its tensors on `device`: a tensor, or a frozen dataclass of tensors and such dataclasses."""
    if isinstance(value, Tensor):
        return cast(T, value.to(device))
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: moved(getattr(value, f.name), device) for f in fields(value) if f.init}
        changed = {name: new for name, new in held.items() if new is not getattr(value, name)}
        return cast(T, replace(cast(Any, value), **changed)) if changed else value
    return value


def total(parts: Sequence[Sums]) -> Sums:
    """Sums over disjoint parts of a batch as those over the whole, added in order."""
    whole = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Sums)}
    return Sums(**whole | {"max_ratio": max(part.max_ratio for part in parts)})
