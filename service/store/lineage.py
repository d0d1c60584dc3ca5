"""Which versions came of which: the line of parents, and what has learnt from a piece of feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.tables import Application, Job, Version


def line(s: Session, adapter_id: str, n: int) -> Iterator[Version]:
    """Version `n`, its parent, and so on; newest first, the base model (0) left out."""
    while n:
        version = s.get_one(Version, (adapter_id, n))
        yield version
        n = version.parent_n


def jobs_of(s: Session, version: Version) -> list[Job]:
    """The jobs that were applied in this version, in order."""
    query = select(Job).join(Application, Application.job_id == Job.id)
    query = query.where(Application.adapter_id == version.adapter_id, Application.version_n == version.n)
    return list(s.scalars(query.order_by(Job.seq)))


def applied(s: Session, adapter_id: str, batch_ids: Sequence[str]) -> set[int]:
    """Versions in which jobs of these batches were applied."""
    query = select(Application.version_n).join(Job, Job.id == Application.job_id)
    return set(s.scalars(query.where(Job.adapter_id == adapter_id, Job.batch_id.in_(batch_ids))))


def since(s: Session, adapter_id: str, batch_ids: Sequence[str]) -> list[Version]:
    """Versions in which these batches were applied, and all that came after them on any line. Oldest first."""
    found: dict[int, Version] = {}
    first = applied(s, adapter_id, batch_ids)
    for version in _all(s, adapter_id):
        if version.n in first or version.parent_n in found:
            found[version.n] = version
    return list(found.values())


def learners(s: Session, adapter_id: str, batch_ids: Sequence[str], remarks: Collection[str]) -> list[Version]:
    """Versions that learnt from these batches, or were trained with one of these remarks standing; and what was trained
    from them. Oldest first.

    An upload's weights came from elsewhere, so it has learnt nothing here; its standing remarks may have taught what
    was trained from it.
    """
    direct = applied(s, adapter_id, batch_ids)
    found: dict[int, Version] = {}
    told: set[int] = set()
    for version in _all(s, adapter_id):
        if any(r in remarks for r in version.standing):
            told.add(version.n)
        came_of = version.n in direct or version.parent_n in found or version.parent_n in told
        if version.source == "training" and came_of:
            found[version.n] = version
    return list(found.values())


def _all(s: Session, adapter_id: str) -> Iterator[Version]:
    yield from s.scalars(select(Version).where(Version.adapter_id == adapter_id).order_by(Version.n))
