"""The queue: what waits, whose turn it is, and which jobs are trained as one batch.

Tenants take turns; among the adapters of one tenant the one that has waited longest is next, each step of priority
counting as `priority_seconds` of waiting: an urgent job is early, and no job waits for ever. A turn is one run. Within
an adapter the order is that of the feedback, whatever the priorities: what is urgent lifts all that waits before it.

Previews change nothing, so they have no place in that order: one goes before the training that waits for its adapter,
and after it a training has its turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, exists, func, or_, select
from sqlalchemy.orm import Session

from api_schemas.jobs import JobKind
from service.db.engine import clock, upsert
from service.db.tables import Adapter, Batch, Job, Run, Turn
from service.store import events, transitions
from service.store.adapters import locked
from service.store.ids import new_id
from service.store.rules import Rules
from service.store.targets import Target


def enqueue(
    s: Session,
    adapter_id: str,
    batch: Batch,
    *,
    kind: JobKind = "train",
    priority: int = 0,
    seed: int | None = None,
    together: str | None = None,
) -> Job:
    """The next job of its adapter, to be trained on the batch's items with the batch's settings.

    `seed` fixes its run's seed. `together`: jobs that share this name, queued one after the other, are one training
    batch, never joined by others; None: decided when the job's turn comes. The adapter's row is locked first, so the
    order of sequence numbers is that of the commits.
    """
    adapter = locked(s, adapter_id)
    now = clock(s)
    job = Job(**_row(adapter, batch.id, now, kind=kind, priority=priority) | {"seed": seed, "together": together})
    s.add(job)
    s.flush()  # its event refers to it
    transitions.queued(s, adapter, job, now, "new")
    return job


_NEW = json.dumps({"why": "new", "attempts": 0})


def new_rows(
    adapter: Target, batch_id: str, now: float, priority: int, kind: JobKind = "train"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The next job of a locked adapter and its event, for their tables: `enqueue` where many come at once. JSON is
    text."""
    job = _row(adapter, batch_id, now, kind=kind, priority=priority)
    event = events.row(adapter, "job.queued", now, job_id=job["id"])
    return job | {"state": "queued"}, event | {"data": _NEW}


def _row(adapter: Adapter | Target, batch_id: str, now: float, *, kind: JobKind, priority: int) -> dict[str, Any]:
    """The adapter's next job; the adapter counts it."""
    if adapter.open_jobs == 0:
        adapter.waits_since = now
    seq = adapter.next_seq
    adapter.next_seq += 1
    adapter.open_jobs += 1
    adapter.priority = max(adapter.priority, priority)
    return {
        "id": new_id("job"),
        "tenant_id": adapter.tenant_id,
        "adapter_id": adapter.id,
        "kind": kind,
        "batch_id": batch_id,
        "seq": seq,
        "priority": priority,
        "attempts": 0,
        "created_at": now,
    }


def pick(s: Session, base_model: str, now: float, rules: Rules) -> Adapter | None:
    """The adapter whose turn it is, locked; None when no job of this base may run now.

    An adapter whose row another transaction holds (the publisher's, or feedback that comes in) is passed over for a
    free one and keeps its place in the line; if there is none, wait for the row. So claims never queue behind one
    another, and the order is exact but for such moments. (SQLite has one writer and locks no rows.)
    """
    query = _next(base_model, now, rules).execution_options(populate_existing=True)
    return (
        s.scalars(query.with_for_update(skip_locked=True, key_share=True, of=Adapter)).first()
        or s.scalars(query.with_for_update(key_share=True, of=Adapter)).first()
    )


def _next(base_model: str, now: float, rules: Rules) -> Select[Adapter]:
    return (
        select(Adapter)
        .outerjoin(Turn, (Turn.tenant_id == Adapter.tenant_id) & (Turn.base_model == Adapter.base_model))
        .where(
            Adapter.base_model == base_model,
            Adapter.open_jobs > 0,
            Adapter.deleted_at.is_(None),
            Adapter.paused_at.is_(None),
            Adapter.blocked_by.is_(None),
            Adapter.run_after <= now,
            or_(Adapter.lease_until.is_(None), Adapter.lease_until < now),
        )
        .order_by(
            func.coalesce(Turn.served_at, 0.0),
            Adapter.waits_since - rules.priority_seconds * Adapter.priority,
            Adapter.id,
        )
        .limit(1)
    )


def took_turn(s: Session, adapter: Adapter, now: float) -> None:
    """To the end of the line: the tenant, and the adapter among its tenant's."""
    adapter.waits_since = now
    key = {"tenant_id": adapter.tenant_id, "base_model": adapter.base_model}
    s.execute(upsert(s, Turn, key | {"served_at": now}, then={"served_at": now}))


def form(s: Session, adapter: Adapter, rules: Rules) -> list[Job]:
    """The first open jobs of the adapter that are one training batch, in order; empty when none is open.

    Which they are is written down at once. Later claims of the same jobs, after whatever happened, get the same batch,
    less those that were cancelled.
    """
    open_jobs = select(Job).where(Job.adapter_id == adapter.id, Job.state.in_(transitions.OPEN)).order_by(Job.seq)
    waiting = open_jobs.where(Job.kind != "preview")
    head = s.scalars(waiting.limit(1)).first()
    preview = s.scalars(open_jobs.where(Job.kind == "preview").limit(1)).first()
    if preview is not None and (head is None or not _previewed_last(s, adapter)):
        return [preview]
    if head is None:
        return []
    if head.together is not None:
        return list(s.scalars(waiting.where(Job.together == head.together)))
    rows = s.execute(
        waiting.add_columns(Batch).join(Batch, Batch.id == Job.batch_id).limit(max(1, rules.coalesce_items))
    ).all()
    jobs = _fitting([(job, batch) for job, batch in rows], rules.coalesce_items)
    for job in jobs:
        job.together = head.id
    return jobs


def training_waits(s: Session, adapter: Adapter) -> bool:
    waits = exists().where(Job.adapter_id == adapter.id, Job.state.in_(transitions.OPEN), Job.kind != "preview")
    return bool(s.scalar(select(waits)))


def _previewed_last(s: Session, adapter: Adapter) -> bool:
    """Whether the adapter's newest run, however it ended, was a preview's."""
    newest = select(Run.id).where(Run.adapter_id == adapter.id).order_by(Run.token.desc()).limit(1).scalar_subquery()
    preview = exists().where(Job.adapter_id == adapter.id, Job.kind == "preview", Job.run_id == newest)
    return bool(s.scalar(select(preview)))


def _fitting(rows: Sequence[tuple[Job, Batch]], most_items: int) -> list[Job]:
    """The first, and those directly after it that train alike, up to so many items in all."""
    (head, first), items = rows[0], 0
    jobs: list[Job] = []
    for job, batch in rows:
        items += batch.item_count
        alike = job.kind == head.kind == "train" and job.together is None and job.seed == head.seed
        if jobs and (not alike or batch.training != first.training or items > most_items):
            break
        jobs.append(job)
    return jobs
