"""Power cuts and kills while version directories are written: a version is whole or absent, an acknowledged one whole.

The functions of worker.versions work on real directories. At each of their syncs, and when they are done, the tree is
looked at: what has changed since the last look is what the disk may still lose (`disk`). Files are told apart by their
inodes, so a rename is seen as one.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from api_schemas.worker import FileEntry
from tests.durability.disk import ROOT, Disk, Event, Mark, Name, Sync, Truncate, Write
from worker import versions

FILES = {"adapter/adapter_config.json": 40, "adapter/adapter_model.safetensors": 1500, "trainer/state.json": 700}
"""Sizes in bytes: below, above and about two sectors."""


class Killed(BaseException):
    """The process ends here. No handler of `Exception` may keep it alive."""


class Tree:
    """A directory whose changes are noted from look to look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Event] = []
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._contents: dict[int, bytes] = {}
        self._nodes: dict[int, int] = {}
        self._fresh = itertools.count(ROOT + 1)

    def look(self) -> None:
        there = {p.stat().st_ino for p in self.root.rglob("*")}
        self._nodes = {inode: node for inode, node in self._nodes.items() if inode in there}  # others may be used again
        for node, path in self._directories():
            now = {p.name: self._node(p) for p in path.iterdir()}
            known = self._names.get(node)
            if known is None:
                self.log.append(Name(node, {}))
            self.log += [Name(node, change) for change in _changes(known or {}, now)]
            self._names[node] = now
            for file in (p for p in path.iterdir() if p.is_file()):
                self._look_into(now[file.name], file.read_bytes())

    def _look_into(self, node: int, content: bytes) -> None:
        if self._contents.get(node) != content:
            self.log += [Truncate(node, len(content)), Write(node, 0, content)]
            self._contents[node] = content

    def _directories(self) -> Iterator[tuple[int, Path]]:
        """Innermost first: a directory is known before its name is."""
        yield from ((self._node(p), p) for p in sorted(self.root.rglob("*"), reverse=True) if p.is_dir())
        yield ROOT, self.root

    def _node(self, path: Path) -> int:
        inode = path.stat().st_ino
        if path != self.root and inode not in self._nodes:
            self._nodes[inode] = next(self._fresh)
        return ROOT if path == self.root else self._nodes[inode]

    def sync(self, path: Path) -> None:
        """The real one, between two looks."""
        self.look()
        versions.sync(path)
        self.log.append(Sync(self._node(path)))


def _changes(before: dict[str, int], now: dict[str, int]) -> list[dict[str, int | None]]:
    """Each change of names by itself; a rename is one change of two names."""
    gone = {node: name for name, node in before.items() if now.get(name) != node}
    new = {name: node for name, node in now.items() if before.get(name) != node}
    renamed: list[dict[str, int | None]] = [
        {gone.pop(node): None, name: node} for name, node in new.items() if node in gone
    ]
    taken = {name for change in renamed for name in change}
    renamed += [{name: node} for name, node in new.items() if name not in taken]
    return renamed + [{name: None} for name in gone.values() if name not in now]


@dataclass
class Writer:
    """A worker's writes, killed now and then. `digests`: of every version that it ever began, by its place."""

    tree: Tree
    chance: random.Random
    skip: Callable[[Path], bool] = lambda _: False
    """Syncs that are left out, for the proof that each is needed."""
    digests: dict[str, str] = field(default_factory=dict)
    token: int = 0
    again: str | None = None
    """The adapter of an attempt that was killed: the next one is for it."""

    def write(self, kill: float) -> None:
        """One attempt at one version. `kill`: the chance of ending at any one sync."""
        self.token += 1
        adapter = self.again or self.chance.choice(("adp_a", "adp_b", f"adp_{self.token}"))
        run, self.again = f"run_{self.token}", None

        def sync(path: Path) -> None:
            if self.chance.random() < kill:
                raise Killed
            if self.skip(path.relative_to(self.tree.root)):
                self.tree.look()
            else:
                self.tree.sync(path)

        try:
            files = self._publish(adapter, run, sync)
        except Killed:
            self.again = adapter
            self.tree.look()
        else:
            self.tree.look()
            self.tree.log.append(Mark("done", (f"{adapter}/{run}", versions.version_digest(files))))

    def _publish(self, adapter: str, run: str, sync: versions.SyncCall) -> list[FileEntry]:
        root = self.tree.root
        versions.clear_leftovers(root, adapter, self.token)
        self.tree.look()
        staging = versions.staging_of(root, adapter, run, self.token)
        versions.create_staging(staging, sync)
        for name, size in FILES.items():
            (staging / name).write_bytes(self.chance.randbytes(size))
        self.digests[f"{adapter}/{run}"] = versions.version_digest(versions.scan(staging))
        return versions.publish(staging, versions.directory_of(root, f"{adapter}/{run}"), sync)


def check(
    root: Path, cuts: int, seed: int, *, written: int = 12, skip: Callable[[Path], bool] = lambda _: False
) -> Counter[str]:
    """`cuts` power cuts over writers' lives of `written` attempts each. Counts: cuts, promises, lost, torn."""
    chance, counts = random.Random(seed), Counter[str]()  # noqa: S311 - repeatable, not secret
    while counts["cuts"] < cuts:
        (place := root / f"life-{counts['lives']}").mkdir()
        counts["lives"] += 1
        writer = Writer(Tree(place), chance, skip)
        for _ in range(written):
            writer.write(kill=0.08)
        log = writer.tree.log
        positions = sorted(chance.randint(0, len(log)) for _ in range(min(20 * written, cuts - counts["cuts"])))
        disk, at = Disk(), 0
        for position in positions:
            for event in log[at:position]:
                disk.apply(event)
            at = position
            promised = dict(e.value for e in log[:position] if isinstance(e, Mark))
            counts += _judge(disk.cut(chance), promised, writer.digests)
    return counts


def _judge(left: dict[str, bytes], promised: dict[str, str], digests: dict[str, str]) -> Counter[str]:
    found = {uri: versions.version_digest(entries) for uri, entries in _versions_in(left).items()}
    lost = [uri for uri, digest in promised.items() if found.get(uri) != digest]
    torn = [uri for uri, digest in found.items() if digests.get(uri) != digest]
    return Counter(cuts=1, promises=len(promised), lost=len(lost), torn=len(torn))


def _versions_in(left: dict[str, bytes]) -> dict[str, list[FileEntry]]:
    """Final directories of what a cut left, with their files as the product would list them."""
    found: dict[str, list[FileEntry]] = {}
    for path, data in left.items():
        adapter, run, name = path.split("/", 2)
        if not run.startswith(".tmp-"):
            entry = FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            found.setdefault(f"{adapter}/{run}", []).append(entry)
    return found
