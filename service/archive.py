"""A version as one file to download: built once, byte for byte the same each time, kept beside the data."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import select

from api_schemas.worker import FileEntry
from service import admission
from service.db.engine import Database
from service.db.tables import Version

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Zip's earliest date: archives of the same files are the same bytes."""


def build(directory: Path, files: Iterable[FileEntry], target: Path) -> None:
    """Zip the PEFT directory of a version, without optimizer state. Its files were checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        _write(directory, files, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk must not fill up with halves


def orphans(database: Database, root: Path) -> list[Path]:
    """Archives of no version that still has its files."""
    with database.read() as s:
        digests = s.scalars(select(Version.digest).where(Version.files_removed_at.is_(None)))
        wanted = {path_of(root, digest) for digest in digests}
    return sorted(path for path in root.glob("*.zip") if path not in wanted)


def path_of(root: Path, digest: str) -> Path:
    """Where the archive of a version with this digest lies, if it was built."""
    return root / f"{digest.removeprefix('sha256:')}.zip"


def _write(directory: Path, files: Iterable[FileEntry], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for entry in sorted(files, key=lambda f: f.name):
            if entry.name.startswith("adapter/"):
                info = zipfile.ZipInfo(entry.name.removeprefix("adapter/"), EPOCH)
                info.external_attr = 0o644 << 16
                with (directory / entry.name).open("rb") as source, archive.open(info, "w", force_zip64=True) as sink:
                    while chunk := source.read(admission.CHUNK):
                        sink.write(chunk)
