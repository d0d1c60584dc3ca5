"""The versions that this process has just written, still in memory: the next job of their adapter starts from them
without reading files.

Only what was written here is kept, so there is nothing to verify that a digest could tell: the tensors are those that
the digest was taken of. What is on disk must nevertheless be what was left there: a file that is gone, new or touched
sends the job to the files, whose every byte is then checked. Whatever is loaded from a disk is checked in any case.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from torch.optim import AdamW

from api_schemas.worker import ParentVersion
from sdpo_core.ema import EmaTeacher
from sdpo_core.lora import LoraPolicy, lora_state
from sdpo_core.optimizer import optimizer_state
from sdpo_core.saved import SavedLora, SavedMoments, size_of
from worker.versions import PARTS, directory_of

Stamp = tuple[tuple[str, int, int, int], ...]
"""Of each file: name, size in bytes, time of its last change, inode."""


@dataclass(frozen=True)
class WarmVersion:
    """All that a job takes over from its parent."""

    lora: SavedLora
    moments: SavedMoments
    ema: EmaTeacher | None

    @property
    def nbytes(self) -> int:
        deltas = [] if self.ema is None else self.ema.deltas.values()
        return self.lora.nbytes + self.moments.nbytes + size_of(t for d in deltas for t in (d.left, d.right))


def warm_version(policy: LoraPolicy, base_model: str, optimizer: AdamW, ema: EmaTeacher | None) -> WarmVersion:
    """What has just been written of these, in main memory. On a CPU the tensors are theirs: train them no further."""
    elsewhere = None if ema is None else ema.on("cpu")
    return WarmVersion(lora_state(policy, base_model), optimizer_state(policy, optimizer), elsewhere)


@dataclass(frozen=True)
class _Kept:
    uri: str
    digest: str
    stamp: Stamp
    version: WarmVersion


class WarmVersions:
    """One version of each adapter, the newest; of the adapters the longest unused goes first."""

    def __init__(self, most_bytes: int = 0) -> None:
        """`most_bytes` 0: nothing is kept."""
        self.most_bytes = most_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(kept.version.nbytes for kept in self._kept.values())

    def keep(self, root: Path, uri: str, digest: str, version: WarmVersion) -> None:
        """Called when the version is under its final name. One that is too large alone is not kept."""
        adapter_id = uri.split("/")[0]
        self._kept.pop(adapter_id, None)
        stamp = _stamp_or_none(root, uri)
        if stamp is None or version.nbytes > self.most_bytes:
            return
        self._kept[adapter_id] = _Kept(uri, digest, stamp, version)
        while self.nbytes > self.most_bytes:
            self._kept.popitem(last=False)

    def find(self, root: Path, parent: ParentVersion | None) -> WarmVersion | None:
        """Exactly this version, if it is held and its files are as they were left. Another of its adapter is dropped:
        it will not be anybody's parent again."""
        if parent is None:
            return None
        adapter_id = parent.uri.split("/")[0]
        if (kept := self._kept.get(adapter_id)) is None:
            return None
        if (kept.uri, kept.digest) != (parent.uri, parent.digest) or kept.stamp != _stamp_or_none(root, kept.uri):
            del self._kept[adapter_id]
            return None
        self._kept.move_to_end(adapter_id)
        return kept.version


def _stamp(directory: Path) -> Stamp:
    """Raises OSError."""
    files = sorted(p for part in PARTS if (directory / part).is_dir() for p in (directory / part).iterdir())
    known = [(p, p.lstat()) for p in files]
    return tuple((f"{p.parent.name}/{p.name}", s.st_size, s.st_mtime_ns, s.st_ino) for p, s in known)


def _stamp_or_none(root: Path, uri: str) -> Stamp | None:
    try:
        return _stamp(directory_of(root, uri))
    except OSError:
        return None
