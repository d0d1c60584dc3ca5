"""Versions in a bucket: `<adapter>/<run>/<sha256>` for each file, and `manifest.json` last.

A key names its content, so writing it again is harmless; the manifest is created once and never overwritten. What a
crash leaves is a prefix that no version refers to, and the database alone says which versions there are.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter

from api_schemas.worker import FileEntry
from service import admission
from service.errors import Unavailable, VersionRejected
from service.storage.base import UPLOADS
from service.storage.bucket import Bucket
from service.storage.cache import Cache, name_of

OWNER = "perennial.json"
MANIFEST = "manifest.json"
_FILES = TypeAdapter(list[FileEntry])


class ObjectStorage:
    remote = True
    sweep_seconds = 3600.0

    def __init__(self, bucket: Bucket, root: Path, engine_root: Path, owner: str) -> None:
        """`root`: this host's own directory, for copies and for what is being put together; `engine_root`: where this
        host's engines see it. `owner`: the installation that the prefix belongs to."""
        self._bucket = bucket
        self._root = root
        self._engine_root = engine_root
        self._owner = owner
        self._cache = Cache(root / "cache")

    def prepare(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._bucket.claim(OWNER, self._owner)

    def check(self) -> None:
        try:
            if self._bucket.owner(OWNER) == self._owner:
                return
        except FileNotFoundError:
            pass
        raise Unavailable(
            "The object storage is not ours or was emptied: see PERENNIAL_STORAGE.", code="storage_unavailable"
        )

    def directory(self, uri: str, files: Sequence[FileEntry]) -> Path:
        digest = admission.version_digest(files)
        if (found := self._cache.get(digest, files)) is not None:
            return found
        with self._cache.making() as making:
            for entry in files:
                self._bring(uri, entry, making / entry.name)
            admission.check_files(making, files)
            return self._cache.adopt(making, digest)

    def _bring(self, uri: str, entry: FileEntry, target: Path) -> None:
        if target.name in (".", ".."):
            raise VersionRejected(f"wrong_files: {entry.name} is no file.")
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as file, self._present(entry.name):
            for piece in self._bucket.pieces(f"{uri}/{entry.sha256}", entry.size):
                file.write(piece)

    @contextmanager
    def _present(self, name: str) -> Iterator[None]:
        """An absent object is a verdict on a version only as long as the bucket itself is there."""
        try:
            yield
        except FileNotFoundError as error:
            self.check()
            raise VersionRejected(f"wrong_files: {name} is not in the object storage.") from error

    def engine_path(self, uri: str, digest: str) -> str:  # noqa: ARG002
        return str(self._engine_root / "cache" / name_of(digest) / "adapter")

    def examine(self, uri: str, files: Sequence[FileEntry]) -> None:
        with self._present(MANIFEST):
            if self._bucket.read(f"{uri}/{MANIFEST}") != _manifest(files):
                raise VersionRejected(f"wrong_files: {MANIFEST} is not what was committed.")
        for entry in files:
            digest, size = hashlib.sha256(), 0
            with self._present(entry.name):
                for piece in self._bucket.pieces(f"{uri}/{entry.sha256}", entry.size + 1):
                    digest.update(piece)
                    size += len(piece)
            if (size, digest.hexdigest()) != (entry.size, entry.sha256):
                raise VersionRejected(f"wrong_checksum: {entry.name} is not what the manifest says.")

    def receive(self, uri: str, sha256: str, path: Path) -> None:
        with self._answering():
            self._bucket.put(f"{uri}/{sha256}", path)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Of a write: S3 says of an absent bucket what it says of an absent key."""
        try:
            yield
        except FileNotFoundError as error:
            raise Unavailable("Our object storage is away; try again.", code="storage_unavailable") from error

    def seal(self, uri: str, files: Sequence[FileEntry]) -> None:
        with self._answering():
            if self._bucket.create(f"{uri}/{MANIFEST}", _manifest(files)):
                return
            if self._bucket.read(f"{uri}/{MANIFEST}") != _manifest(files):
                raise VersionRejected("wrong_files: another version has this place.")

    def landing(self, adapter_id: str, run_id: str) -> Path:
        return self._root / adapter_id / f".upload-of-{run_id}"

    def publish(self, uri: str, files: Sequence[FileEntry]) -> None:
        landed = self.landing(*uri.split("/"))
        try:
            for entry in files:
                self.receive(uri, entry.sha256, landed / entry.name)
            self.seal(uri, files)
            self._cache.adopt(landed, admission.version_digest(files))
        finally:
            shutil.rmtree(landed, ignore_errors=True)

    def is_sealed(self, uri: str) -> bool:
        return self._bucket.has(f"{uri}/{MANIFEST}")

    def discard(self, uri: str) -> None:
        with suppress(Unavailable):
            self.clear(*uri.split("/"))

    def stage(self, adapter_id: str, sha256: str, path: Path) -> None:
        with self._answering():
            self._bucket.put(f"{adapter_id}/{UPLOADS}/{sha256}", path)

    def fetch_staged(self, adapter_id: str, sha256: str, path: Path) -> None:
        aside = path.with_name(f".part-{secrets.token_hex(8)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = hashlib.sha256()
            with suppress(FileNotFoundError), aside.open("wb") as file:
                for piece in self._bucket.pieces(f"{adapter_id}/{UPLOADS}/{sha256}", sys.maxsize):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() == sha256:
                aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)

    def unstage(self, adapter_id: str, sha256: str) -> None:
        with suppress(Unavailable):  # else the next sweep does it
            self._bucket.delete([f"{adapter_id}/{UPLOADS}/{sha256}"])

    def adapters(self) -> list[str]:
        return [name for name in self._bucket.folders() if name.startswith("adp_")]

    def names(self, adapter_id: str) -> list[str]:
        return self._bucket.folders(adapter_id)

    def where(self, adapter_id: str, name: str = "") -> str:
        return f"{self._bucket.url}/{adapter_id}/{name}"

    def touched(self, adapter_id: str, name: str) -> float:
        return max(self._bucket.written(f"{adapter_id}/{name}").values(), default=time.time())

    def hide(self, adapter_id: str, name: str) -> str:
        self._bucket.delete([f"{adapter_id}/{name}/{MANIFEST}"])
        return name

    def clear(self, adapter_id: str, name: str) -> bool:
        """The manifest first: what is left then is no version."""
        keys = sorted(self._bucket.written(f"{adapter_id}/{name}"), key=lambda key: not key.endswith(MANIFEST))
        self._bucket.delete(keys)
        return True

    def purge(self, adapter_id: str) -> None:
        self._bucket.delete(self._bucket.written(adapter_id))
        shutil.rmtree(self._root / adapter_id, ignore_errors=True)

    def tidy(self, keep: Collection[str]) -> None:
        self._cache.evict(keep)


def _manifest(files: Sequence[FileEntry]) -> bytes:
    return _FILES.dump_json(sorted(files, key=lambda f: f.name), indent=2)
