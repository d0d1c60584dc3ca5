"""This host's copies of versions, each under its digest: engines need a directory, and are near."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from api_schemas.worker import FileEntry
from service import admission
from service.errors import VersionRejected

GRACE_SECONDS = 3600.0
"""How long a copy stays that nobody asks for."""


def name_of(digest: str) -> str:
    return digest.removeprefix("sha256:")


class Cache:
    """A directory of version directories. Processes of one host may share it: whoever is about to use a copy touches
    it under the shared lock, and nothing goes that was touched lately."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, digest: str, files: Sequence[FileEntry]) -> Path | None:
        """The copy, if there is one and each byte is right. A wrong one is set aside."""
        path = self.root / name_of(digest)
        with self._locked(fcntl.LOCK_SH):
            if not path.is_dir():
                return None
            os.utime(path)
        try:
            admission.check_files(path, files)
        except VersionRejected:
            self.drop(path)
            return None
        return path

    @contextmanager
    def making(self) -> Iterator[Path]:
        """A new directory, gone with the block unless it was adopted."""
        path = self.root / f".tmp-{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def adopt(self, made: Path, digest: str) -> Path:
        """Give a directory that was checked its name, unless another process was faster. It lies on the same disk."""
        path = self.root / name_of(digest)
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            try:
                os.rename(made, path)
            except OSError:  # there already, with the same bytes
                if not path.is_dir():
                    raise
            os.utime(path)
        return path

    def drop(self, path: Path) -> None:
        """Out of everybody's way at once, then away."""
        aside = self.root / f".gone-{secrets.token_hex(8)}"
        with self._locked(fcntl.LOCK_EX):
            if not path.is_dir():
                return
            os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def evict(self, keep: Collection[str], grace: float = GRACE_SECONDS) -> None:
        """Every copy but those of these digests that nobody has touched for `grace` seconds."""
        kept, before = {name_of(d) for d in keep}, time.time() - grace
        for path in self.root.glob("*"):
            if path.is_dir() and path.name not in kept and _older(path, before):
                with self._locked(fcntl.LOCK_EX):
                    if not _older(path, before):
                        continue
                    aside = self.root / f".gone-{secrets.token_hex(8)}"
                    os.rename(path, aside)
                shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("wb") as file:
            fcntl.flock(file, kind)
            yield


def _older(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime < than
    except FileNotFoundError:
        return False
