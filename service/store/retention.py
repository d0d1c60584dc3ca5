"""Which versions lose their files: those beyond the newest few that nothing points to and nobody asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.engine import clock
from service.db.tables import Adapter, Version
from service.serving.names import served_name
from service.store import adapters


def doom(s: Session, keep: int, created_before: float, asked: Collection[str]) -> None:
    """Mark the files of versions that are to go: from now on they can neither be loaded nor promoted.

    Kept are the newest `keep` of each adapter, what was made since `created_before`, what is in `asked` (served names),
    and the adapter's own pointers.
    """
    crowded = (
        select(Version.adapter_id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Version.files_doomed_at.is_(None), Adapter.deleted_at.is_(None))
        .group_by(Version.adapter_id)
        .having(func.count() > keep)
    )
    for adapter_id in list(s.scalars(crowded)):
        _doom_of(s, adapters.locked(s, adapter_id), keep, created_before, asked)


def spent(s: Session) -> list[tuple[str, int]]:
    """(adapter, n) of versions that a rebuild has replaced and that nothing points to any more."""
    query = (
        select(Version.adapter_id, Version.n)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(
            Version.retired_at.is_not(None),
            Version.files_doomed_at.is_(None),
            Version.n != Adapter.live_n,
            Version.n != Adapter.head_n,
        )
    )
    return [(adapter_id, n) for adapter_id, n in s.execute(query)]


def doom_spent(s: Session, versions: Sequence[tuple[str, int]]) -> None:
    """Mark their files, as `doom` does; whatever points to one after all keeps it."""
    for adapter_id, n in sorted(versions):
        adapter = adapters.locked(s, adapter_id)
        if n not in (adapter.live_n, adapter.head_n):
            s.get_one(Version, (adapter_id, n)).files_doomed_at = clock(s)


def _doom_of(s: Session, adapter: Adapter, keep: int, created_before: float, asked: Collection[str]) -> None:
    having = select(Version).where(Version.adapter_id == adapter.id, Version.files_doomed_at.is_(None))
    found = {v.n: v for v in s.scalars(having.order_by(Version.n.desc()))}
    good = [n for n, v in found.items() if v.status != "rejected"]
    needed = {*good[:keep], adapter.live_n, *_line_of(s, adapter)}
    for n, version in found.items():
        if n not in needed and version.created_at < created_before and served_name(adapter.id, n) not in asked:
            version.files_doomed_at = clock(s)


def _line_of(s: Session, adapter: Adapter) -> set[int]:
    """The head, its parent, and further back as long as versions are not published: a rejection falls back on them."""
    line, n = {adapter.head_n}, adapter.head_n
    while n:
        version = s.get_one(Version, (adapter.id, n))
        n = version.parent_n
        line.add(n)
        if version.status == "published":
            break
    return line


def doomed(s: Session) -> list[tuple[str, int]]:
    """(adapter, n) of every version whose files are to be removed and are not yet."""
    query = (
        select(Version.adapter_id, Version.n)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Version.files_doomed_at.is_not(None), Version.files_removed_at.is_(None), Adapter.purged_at.is_(None))
    )
    return [(adapter_id, n) for adapter_id, n in s.execute(query)]
