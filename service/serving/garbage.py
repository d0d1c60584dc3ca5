"""Directories, or their like in object storage, that no version refers to and no run can come back to.

A run that has ended can never commit: its token is fenced. So its directory may go, whatever its worker still writes.
A directory of no run at all may be an upload a moment before its commit: it has an hour. Either is first hidden, under
the lock that a commit needs, so that nothing is removed that a version has come to refer to meanwhile.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.tables import Adapter, Run, Version
from service.storage.base import GOING, UPLOADS, Storage
from service.store import adapters

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0
_RUN = re.compile(r"run_[0-9a-f]{1,64}")
_STAGING = re.compile(r"\.tmp-\d+\.(run_[0-9a-f]{1,64})")


@dataclass(frozen=True)
class Orphan:
    """A directory that nothing refers to."""

    adapter_id: str
    name: str
    why: str


def orphans(database: Database, storage: Storage, grace: float = GRACE_SECONDS) -> Iterator[Orphan]:
    """Every orphan that has not been written to for `grace` seconds."""
    before = time.time() - grace
    for adapter_id in storage.adapters():
        with database.read() as s:
            kept = set(s.scalars(_kept(adapter_id)))
        for name in (n for n in storage.names(adapter_id) if n not in kept):
            with database.read() as s:
                why = _orphaned(s, adapter_id, name, staged=storage.remote)
            if why is not None and storage.touched(adapter_id, name) <= before:
                yield Orphan(adapter_id, name, why)


def _kept(adapter_id: str) -> Select[str]:
    """Most directories: those of versions that have their files."""
    return select(Version.run_id).where(Version.adapter_id == adapter_id, Version.files_removed_at.is_(None))


def _orphaned(s: Session, adapter_id: str, name: str, *, staged: bool) -> str | None:
    """Why nothing refers to it, or None if something does. `staged`: files of uploads count too; in a directory they
    are cleared one by one."""
    if name.startswith(GOING):
        return "half removed"
    if staged and name == UPLOADS:
        return "of uploads that nobody committed"
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


def remove(database: Database, storage: Storage, orphan: Orphan) -> bool:
    """Take it away, if it still is an orphan."""
    with database.write() as s:
        if s.get(Adapter, orphan.adapter_id) is not None:
            adapters.locked(s, orphan.adapter_id)
        if _orphaned(s, orphan.adapter_id, orphan.name, staged=storage.remote) is None:
            return False
        going = storage.hide(orphan.adapter_id, orphan.name)
    return storage.clear(orphan.adapter_id, going)


def collect(database: Database, storage: Storage, grace: float = GRACE_SECONDS) -> list[Orphan]:
    """Remove every orphan; returns those that are gone."""
    gone = [orphan for orphan in orphans(database, storage, grace) if remove(database, storage, orphan)]
    for orphan in gone:
        log.info("garbage: removed %s/%s, %s", orphan.adapter_id, orphan.name, orphan.why)
    return gone
