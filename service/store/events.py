"""The outbox: one row per change of a job or a version, written in the transaction that makes the change.

`n` counts from 1 per adapter, without gaps. It is taken from the adapter's row while that row is locked, and the lock
is kept to the commit, so the order of `n` is the order of commits, in PostgreSQL too: when a reader sees `n`, every
smaller one of that adapter is visible already. (A sequence of the database gives its numbers out before the commit: a
reader that has seen 8 may find 7 later.) So a reader keeps the last `n` it has dealt with, per adapter, and asks for
those above; an adapter has news when `adapters.events_n` is greater. There is no order between adapters but time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api_schemas.webhooks import EventName as EventType
from service.db.tables import Adapter, Event, Job
from service.store.targets import Target


def record(
    s: Session,
    adapter: Adapter,
    kind: EventType,
    now: float,
    *,
    job: Job | None = None,
    version: int | None = None,
    data: dict[str, str | int] | None = None,
) -> None:
    """Write one event. The caller has locked the adapter's row (`adapters.locked`) and holds the lock to the end.

    `now`: the database's time. `data`: small facts such as an error's code; never text that a user wrote.
    """
    job_id = job.id if job is not None else None
    s.add(Event(**row(adapter, kind, now, job_id=job_id, version=version, data=data)))


def row(
    adapter: Adapter | Target,
    kind: EventType,
    now: float,
    *,
    job_id: str | None = None,
    version: int | None = None,
    data: dict[str, str | int] | None = None,
) -> dict[str, Any]:
    """The adapter's next event, for the table; the adapter counts it. Locked as for `record`."""
    adapter.events_n += 1
    return {
        "adapter_id": adapter.id,
        "n": adapter.events_n,
        "type": kind,
        "job_id": job_id,
        "version_n": version,
        "data": data or {},
        "created_at": now,
    }


def since(s: Session, adapter_id: str, n: int, *, job_id: str | None = None, limit: int = 100) -> Sequence[Event]:
    """What happened after event `n`, oldest first; to one job alone if it is named."""
    query = select(Event).where(Event.adapter_id == adapter_id, Event.n > n)
    if job_id is not None:
        query = query.where(Event.job_id == job_id)
    return s.scalars(query.order_by(Event.n).limit(limit)).all()
