"""Versions: look-up, the publisher's verdict, and what their clients see."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

import api_schemas.adapters as wire
from api_schemas.jobs import StepMetrics
from service.db.engine import clock
from service.db.tables import Adapter, Application, Item, Job, Version
from service.errors import Gone, NotFound, Unprocessable
from service.store.adapters import locked, move_head


def get(s: Session, adapter: Adapter, n: int) -> Version:
    version = s.get(Version, (adapter.id, n))
    if version is None:
        raise NotFound(f"Adapter '{adapter.name}' has no version {n}.", code="version_not_found", param="version")
    return version


def servable(s: Session, adapter: Adapter, n: int) -> Version:
    """Like `get`, but refuses a version that the engine refused."""
    version = get(s, adapter, n)
    if version.status == "rejected":
        raise Unprocessable(f"Version {n} was rejected: {version.rejection}", code="version_rejected", param="version")
    return with_files(version)


def with_files(version: Version) -> Version:
    """Raises Gone when retention has taken its files."""
    if version.files_doomed_at is not None:
        raise Gone(f"The files of version {version.n} were removed: old versions are not kept here.", param="version")
    return version


def listing(s: Session, adapter: Adapter, after: int | None, limit: int) -> tuple[list[Version], bool]:
    """Oldest first; True when there are more."""
    query = select(Version).where(Version.adapter_id == adapter.id, Version.n > (after or 0))
    rows = list(s.scalars(query.order_by(Version.n).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def reject(s: Session, adapter_id: str, n: int, reason: str, code: str = "version_rejected") -> None:
    """No engine will have the head: its jobs are reported failed (`code`), the head goes back to what it came from.

    Changes nothing when the head has moved on, or when the version was served meanwhile.
    """
    adapter = locked(s, adapter_id)
    if adapter.head_n != n or adapter.live_n == n:
        return
    version = s.get_one(Version, (adapter_id, n))
    version.status, version.rejection = "rejected", reason
    applied = select(Application.job_id).where(Application.adapter_id == adapter_id, Application.version_n == n)
    s.execute(
        update(Job)
        .where(Job.id.in_(applied))
        .values(state="failed", error={"code": code, "message": reason}, finished_at=clock(s))
    )
    # Not to what is live: between the two there may be versions that are only not served yet.
    move_head(s, adapter, version.parent_n)


def feedback_of(s: Session, version: Version) -> tuple[list[str], list[str]]:
    """Ids of the batches and of the items that this version learnt from."""
    jobs = select(Application.job_id).where(
        Application.adapter_id == version.adapter_id, Application.version_n == version.n
    )
    batches = list(s.scalars(select(Job.batch_id).where(Job.id.in_(jobs)).order_by(Job.seq)))
    items = s.scalars(select(Item.id).where(Item.batch_id.in_(batches)).order_by(Item.batch_id, Item.position))
    return batches, list(items)


def view(s: Session, adapter: Adapter, version: Version) -> wire.Version:
    batches, items = feedback_of(s, version)
    return wire.Version(
        adapter=adapter.name,
        version=version.n,
        parent=version.parent_n,
        source=version.source,
        files="kept" if version.files_doomed_at is None else "removed",
        status="rejected" if version.status == "rejected" else "published" if version.published_at else "pending",
        live=adapter.live_n == version.n,
        digest=version.digest,
        size_bytes=version.size_bytes,
        batch_ids=batches,
        feedback_ids=items,
        standing_feedback=version.standing,
        training=version.training,
        seed=version.seed,
        metrics=[StepMetrics.model_validate(m) for m in version.metrics],
        rejection=version.rejection,
        created_at=int(version.created_at),
    )
