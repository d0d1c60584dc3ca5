"""Directories below the adapters root that no version refers to and no run can come back to.

A run that has ended can never commit: its token is fenced. So its directory may go, whatever its worker still writes.
A directory of no run at all may be an upload a moment before its commit: it has an hour. Either is first renamed, under
the lock that a commit needs, so that nothing is removed that a version has come to refer to meanwhile.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.tables import Adapter, Run, Version
from service.store import adapters

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0
_RUN = re.compile(r"run_[0-9a-f]{1,64}")
_STAGING = re.compile(r"\.tmp-\d+\.(run_[0-9a-f]{1,64})")
GOING = ".gone-"
"""Prefix of a directory that is being removed."""


@dataclass(frozen=True)
class Orphan:
    """A directory that nothing refers to."""

    path: Path
    adapter_id: str
    why: str


def orphans(database: Database, root: Path, grace: float = GRACE_SECONDS) -> Iterator[Orphan]:
    """Every orphan that has not been written to for `grace` seconds."""
    before = time.time() - grace
    for adapter in sorted(p for p in root.glob("adp_*") if p.is_dir() and not p.is_symlink()):
        with database.read() as s:
            kept = set(s.scalars(_kept(adapter.name)))
        for path in sorted(p for p in adapter.iterdir() if p.name not in kept):
            if path.is_symlink() or not path.is_dir() or _touched(path) > before:
                continue
            with database.read() as s:
                why = _orphaned(s, adapter.name, path.name)
            if why is not None:
                yield Orphan(path, adapter.name, why)


def _kept(adapter_id: str) -> Select[str]:
    """Most directories: those of versions that have their files."""
    return select(Version.run_id).where(Version.adapter_id == adapter_id, Version.files_removed_at.is_(None))


def _touched(path: Path) -> float:
    """When anything in it was last made or written, Unix seconds; now, if it is going at this moment."""
    try:
        return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _orphaned(s: Session, adapter_id: str, name: str) -> str | None:
    """Why nothing refers to it, or None if something does."""
    if name.startswith(GOING):
        return "half removed"
    staging = _STAGING.fullmatch(name)
    if staging is None and _RUN.fullmatch(name) is None:
        return None  # not ours to judge: `.uploads` and its like
    run_id = staging[1] if staging else name
    run = s.get(Run, run_id)
    if run is None:
        return "of no run"
    if run.adapter_id != adapter_id:
        return "of another adapter's run"
    if run.state == "running":
        return None
    version = s.scalar(select(Version).where(Version.run_id == run_id))
    if version is not None and not staging:
        return None if version.files_removed_at is None else "of a version whose files were removed"
    return f"of a run that {'was' if run.state != 'committed' else 'has'} {run.state}"


def remove(database: Database, orphan: Orphan) -> bool:
    """Take it away, if it still is an orphan."""
    going = orphan.path.with_name(f"{GOING}{orphan.path.name.removeprefix(GOING)}")
    with database.write() as s:
        if s.get(Adapter, orphan.adapter_id) is not None:
            adapters.locked(s, orphan.adapter_id)
        if _orphaned(s, orphan.adapter_id, orphan.path.name) is None:
            return False
        orphan.path.rename(going)
    shutil.rmtree(going, ignore_errors=True)
    return not going.exists()


def collect(database: Database, root: Path, grace: float = GRACE_SECONDS) -> list[Orphan]:
    """Remove every orphan; returns those that are gone."""
    gone = [orphan for orphan in orphans(database, root, grace) if remove(database, orphan)]
    for orphan in gone:
        log.info("garbage: removed %s/%s, %s", orphan.adapter_id, orphan.path.name, orphan.why)
    return gone
