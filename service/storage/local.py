"""A directory that service, workers and engines share: whoever makes a version renames it into its place."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from api_schemas.worker import FileEntry
from service import admission
from service.errors import Unavailable
from service.storage.base import GOING


class LocalStorage:
    remote = False
    sweep_seconds = 60.0

    def __init__(self, root: Path, engine_root: Path) -> None:
        """`engine_root`: where engines see `root`."""
        self._root = root
        self._engine_root = engine_root

    def prepare(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        if not self._root.is_dir():
            raise Unavailable("The adapters directory is away; try again.", code="storage_unavailable", retry_after=5)

    def directory(self, uri: str, files: Sequence[FileEntry]) -> Path:
        self.check()
        directory = self._root / uri
        admission.check_files(directory, files)
        return directory

    def engine_path(self, uri: str, digest: str) -> str:  # noqa: ARG002
        return str(self._engine_root / uri / "adapter")

    def examine(self, uri: str, files: Sequence[FileEntry]) -> None:
        self.directory(uri, files)

    def receive(self, uri: str, sha256: str, path: Path) -> None:
        raise NotImplementedError("workers write into the shared directory themselves")

    def seal(self, uri: str, files: Sequence[FileEntry]) -> None:
        """The worker's rename was the seal."""

    def landing(self, adapter_id: str, run_id: str) -> Path:
        return self._root / adapter_id / run_id

    def publish(self, uri: str, files: Sequence[FileEntry]) -> None:
        """It landed where it stays."""

    def is_sealed(self, uri: str) -> bool:
        return (self._root / uri).is_dir()

    def discard(self, uri: str) -> None:
        shutil.rmtree(self._root / uri, ignore_errors=True)

    def stage(self, adapter_id: str, sha256: str, path: Path) -> None:
        """Every process sees it where it is."""

    def fetch_staged(self, adapter_id: str, sha256: str, path: Path) -> None:
        """It is there or nowhere."""

    def unstage(self, adapter_id: str, sha256: str) -> None:
        """Its one copy is the caller's to remove."""

    def adapters(self) -> list[str]:
        return sorted(p.name for p in self._root.glob("adp_*") if p.is_dir() and not p.is_symlink())

    def names(self, adapter_id: str) -> list[str]:
        found = (self._root / adapter_id).iterdir()
        return sorted(p.name for p in found if p.is_dir() and not p.is_symlink())

    def where(self, adapter_id: str, name: str = "") -> str:
        return str(self._root / adapter_id / name)

    def touched(self, adapter_id: str, name: str) -> float:
        path = self._root / adapter_id / name
        try:
            return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
        except FileNotFoundError:
            return time.time()

    def hide(self, adapter_id: str, name: str) -> str:
        going = f"{GOING}{name.removeprefix(GOING)}"
        os.rename(self._root / adapter_id / name, self._root / adapter_id / going)
        return going

    def clear(self, adapter_id: str, name: str) -> bool:
        path = self._root / adapter_id / name
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()

    def purge(self, adapter_id: str) -> None:
        shutil.rmtree(self._root / adapter_id, ignore_errors=True)

    def tidy(self, keep: Collection[str]) -> None:
        """Nothing here is a copy."""
