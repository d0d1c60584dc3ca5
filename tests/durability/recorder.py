"""A file system for SQLite that writes down, in order, everything that reaches the disk."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import apsw

from tests.durability.disk import ROOT, Event, Mark, Name, Sync, Truncate, Write

JOURNALS = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_SUPER_JOURNAL
_serial = itertools.count()


class Recorder(apsw.VFS):  # type: ignore[misc]
    """Real files in one directory, and the log of their writes. `vfs_name` is how a connection asks for it.

    The wal-index (`-shm`) is shared memory: nothing of it is recorded, after a cut it is not there.
    """

    def __init__(self) -> None:
        self.vfs_name = f"recorder-{next(_serial)}"
        self.log: list[Event] = []
        self._nodes: dict[str, int] = {}
        self._fresh = itertools.count(ROOT + 1)
        super().__init__(self.vfs_name, "")

    def mark(self, kind: str, value: Any = None) -> None:
        self.log.append(Mark(kind, value))

    def adopt(self, files: dict[str, Path]) -> None:
        """Files that were there, whole and synced, before the recording began."""
        for name, path in files.items():
            self.log += [Write(self._node(name), 0, path.read_bytes()), Sync(self._nodes[name])]
        self.log.append(Sync(ROOT))

    def _node(self, name: str) -> int:
        """The file of this name; a new one if there is none."""
        if name not in self._nodes:
            self._nodes[name] = next(self._fresh)
            self.log.append(Name(ROOT, {name: self._nodes[name]}))
        return self._nodes[name]

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's name
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        assert path is not None, "temporary files belong in memory"
        return _File(self, self._node(os.path.basename(path)), name, flags)

    def xDelete(self, path: str, sync_directory: bool) -> None:  # noqa: N802
        super().xDelete(path, sync_directory)
        if self._nodes.pop(name := os.path.basename(path), None) is not None:
            self.log.append(Name(ROOT, {name: None}))
        if sync_directory:
            self.log.append(Sync(ROOT))


class _File(apsw.VFSFile):  # type: ignore[misc]
    def __init__(self, recorder: Recorder, node: int, name: Any, flags: list[int]) -> None:
        self._log, self._node = recorder.log, node
        # SQLite's Unix layer syncs the directory along with the first sync of a journal that it may have created.
        self._directory_too = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & JOURNALS)
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self._log.append(Write(self._node, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        super().xTruncate(size)
        self._log.append(Truncate(self._node, size))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._log.append(Sync(self._node))
        if self._directory_too:
            self._log.append(Sync(ROOT))
            self._directory_too = False
