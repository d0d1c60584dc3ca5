"""A disk that keeps what was synced and, when the power goes, anything or nothing of the rest.

Files and directories are nodes. What is written to a node is pending until that node is synced; names are what is
written to a directory. At a cut each pending write is dropped, kept, or torn at sectors of 512 bytes, and each pending
change of names is dropped or kept (a rename is one change). Nothing is kept in order unless a sync orders it: harsher
than file systems with a journal are, as harsh as POSIX allows.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTOR = 512
ROOT = 0
"""The directory that everything lies in."""


@dataclass(frozen=True, slots=True)
class Name:
    """These names of a directory change at once: to a node, or to nothing."""

    directory: int
    names: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Write:
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    node: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    node: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Not the disk's affair: what the program knew or had promised at this moment."""

    kind: str
    value: Any = None


Event = Name | Write | Truncate | Sync | Mark


def scratch() -> Path:
    """A directory in memory, where the system offers that: for what is written thousands of times."""
    memory = "/dev/shm"  # noqa: S108 - mkdtemp makes a directory for us alone
    return Path(tempfile.mkdtemp(prefix="perennial-", dir=memory if os.path.isdir(memory) else None))


class Disk:
    def __init__(self) -> None:
        self._contents: dict[int, bytearray] = defaultdict(bytearray)
        self._names: dict[int, dict[str, int]] = defaultdict(dict)
        self._writes: dict[int, list[Write | Truncate]] = defaultdict(list)
        self._renames: dict[int, list[Name]] = defaultdict(list)

    def apply(self, event: Event) -> None:
        if isinstance(event, Write | Truncate):
            self._writes[event.node].append(event)
        elif isinstance(event, Name):
            self._renames[event.directory].append(event)
        elif isinstance(event, Sync):
            for write in self._writes.pop(event.node, ()):
                _put(self._contents[event.node], write)
            for change in self._renames.pop(event.node, ()):
                _rename(self._names[event.node], change)

    def cut(self, chance: random.Random) -> dict[str, bytes]:
        """What lies on the disk if the power goes now: path -> content."""
        mood = chance.choice(("all", "none", "some", "some"))
        found: dict[str, bytes] = {}
        self._walk(ROOT, "", mood, chance, found)
        return found

    def _walk(self, directory: int, at: str, mood: str, chance: random.Random, found: dict[str, bytes]) -> None:
        names = dict(self._names[directory])
        for change in self._renames.get(directory, ()):
            if mood == "all" or (mood == "some" and chance.random() < 0.5):
                _rename(names, change)
        for name, node in names.items():
            if node in self._names or node in self._renames:
                self._walk(node, f"{at}{name}/", mood, chance, found)
            else:
                found[at + name] = self._content(node, mood, chance)

    def _content(self, node: int, mood: str, chance: random.Random) -> bytes:
        content = bytearray(self._contents[node])
        for write in self._writes.get(node, ()):
            fate = chance.choice(("drop", "keep", "tear")) if mood == "some" else "keep" if mood == "all" else "drop"
            if fate == "keep" or (fate == "tear" and isinstance(write, Truncate)):
                _put(content, write)
            elif fate == "tear" and isinstance(write, Write):
                for piece in _sectors(write):
                    if chance.random() < 0.5:
                        _put(content, piece)
        return bytes(content)


def _rename(names: dict[str, int], change: Name) -> None:
    for name, node in change.names.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _put(content: bytearray, change: Write | Truncate) -> None:
    size = change.size if isinstance(change, Truncate) else change.offset
    if len(content) < size:
        content.extend(bytes(size - len(content)))
    if isinstance(change, Truncate):
        del content[size:]
    else:
        content[size : size + len(change.data)] = change.data


def _sectors(write: Write) -> list[Write]:
    """The parts of a write that lie in one sector each."""
    first, end = write.offset - write.offset % SECTOR, write.offset + len(write.data)
    edges = [write.offset, *range(first + SECTOR, end, SECTOR), end]
    return [Write(write.node, a, write.data[a - write.offset : b - write.offset]) for a, b in itertools.pairwise(edges)]
