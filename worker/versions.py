"""Adapter versions on disk: immutable directories `<root>/<adapter id>/<run id>/{adapter,trainer}/`.

A version is written under a temporary name beside its final place, synced, then renamed; so it is there whole or not
at all, whatever is killed. A name is never reused. Only `adapter/` is ever offered to clients.

**Version digest** (service and worker compute the same): SHA-256 over the UTF-8 lines `"<name> <size> <sha256>\\n"` of
all files, sorted by name, where name is `adapter/<file>` or `trainer/<file>`, size is in bytes and sha256 is lower-case
hex; written as `sha256:<hex>`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from api_schemas.worker import FileEntry

PARTS = ("adapter", "trainer")
SyncCall = Callable[[Path], None]
_STAGING = re.compile(r"\.tmp-(\d+)\.[A-Za-z0-9_-]+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def version_digest(files: Iterable[FileEntry]) -> str:
    """The digest that names a version's content, as defined at the head of this file."""
    lines = sorted((f.name, f"{f.name} {f.size} {f.sha256}\n") for f in files)
    return "sha256:" + hashlib.sha256("".join(line for _, line in lines).encode()).hexdigest()


def scan(version: Path) -> list[FileEntry]:
    """Every file of a version directory with size and SHA-256, sorted by name.

    An uploaded version has no `trainer/`. Raises OSError when `adapter/` is missing, and ValueError for anything that
    is not a plain file of `adapter/` or `trainer/` (a link could point at what is not part of the version).
    """
    if strange := sorted(p.name for p in version.iterdir() if p.name not in PARTS):
        raise ValueError(f"{strange[0]!r} does not belong into a version directory")
    parts = [version / part for part in PARTS if part == "adapter" or (version / part).exists()]
    return sorted((_entry(path) for part in parts for path in part.iterdir()), key=lambda f: f.name)


def _entry(path: Path) -> FileEntry:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name!r} is not a plain file")
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size = os.fstat(stream.fileno()).st_size
    return FileEntry(name=f"{path.parent.name}/{path.name}", size=size, sha256=sha256)


def directory_of(root: Path, uri: str) -> Path:
    """Where `<adapter id>/<run id>` lies. Raises ValueError for a uri that could leave the root."""
    names = uri.split("/")
    if len(names) != 2 or not all(_NAME.fullmatch(n) for n in names):
        raise ValueError(f"not a version's place: {uri!r}")
    return root.joinpath(*names)


def staging_of(root: Path, adapter_id: str, run_id: str, token: int) -> Path:
    """Where a run writes before its rename. The fencing token in the name tells a dead run's leftovers from the
    work of a newer one. Raises ValueError for ids that could leave the root."""
    return directory_of(root, f"{adapter_id}/{run_id}").with_name(f".tmp-{token}.{run_id}")


def clear_leftovers(root: Path, adapter_id: str, token: int) -> None:
    """Remove what runs with this or an older token left unfinished. A newer run's directory is not ours to touch."""
    for path in (root / adapter_id).glob(".tmp-*"):
        found = _STAGING.fullmatch(path.name)
        if found and int(found[1]) <= token:
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync a file or a directory. Raises OSError; the data may then be lost and must be written anew."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_staging(staging: Path, sync: SyncCall = sync) -> None:
    """Make an empty staging directory with its parts; the adapter's directory is made durable on the way."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    sync(staging.parent.parent)  # also when it was there: who made it may have been killed before this line
    for part in PARTS:
        (staging / part).mkdir(parents=True)


def publish(staging: Path, final: Path, sync: SyncCall = sync) -> list[FileEntry]:
    """Sync and hash the staged files, then give them their final name. Returns the files' entries.

    After a crash the directory exists whole under `final` or not at all. When `final` already holds the same bytes (an
    earlier try of the same run got that far), that one is kept; different bytes raise FileExistsError.
    """
    files = scan(staging)
    for entry in files:
        sync(staging / entry.name)
    for directory in (*(staging / part for part in PARTS), staging):
        sync(directory)
    if final.exists():
        if version_digest(scan(final)) != version_digest(files):
            raise FileExistsError(f"{final.name} already holds another version")
        shutil.rmtree(staging)
    else:
        staging.rename(final)
    sync(final.parent)
    return files


def discard(root: Path, adapter_id: str, run_id: str, token: int, *, published: bool) -> None:
    """Remove what a given-up run wrote. `published`: also its final directory, which is safe only as long as no
    commit of the run has ever been sent: from then on only the service knows whether a version refers to it."""
    try:
        final = directory_of(root, f"{adapter_id}/{run_id}")
    except ValueError:
        return  # ids that name no place: nothing was written
    shutil.rmtree(staging_of(root, adapter_id, run_id, token), ignore_errors=True)
    if published:
        shutil.rmtree(final, ignore_errors=True)
