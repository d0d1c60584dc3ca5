"""Adapters: creation, look-up by their tenant, deletion, and the two pointers head and live."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import api_schemas.adapters as wire
from api_schemas.training import LoraSettings, TrainingSettings
from service.db.engine import clock
from service.db.tables import Adapter, Job, Run, Version
from service.errors import Conflict, NotFound, TooMany
from service.store import events, transitions
from service.store.ids import new_id


def create(s: Session, tenant_id: str, request: wire.AdapterCreate, base_model: str, *, limit: int) -> Adapter:
    """A new adapter at version 0, which is the base model itself."""
    alive = s.scalar(
        select(func.count()).select_from(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
    )
    if (alive or 0) >= limit:
        raise TooMany(f"You have {limit} adapters, the most allowed: delete one first.", retry_after=60)
    adapter = Adapter(
        id=new_id("adp"),
        tenant_id=tenant_id,
        name=request.name,
        base_model=base_model,
        lora=request.lora.model_dump(),
        training=request.training.model_dump(exclude_none=True),
        on_failure=request.on_failure,
        events_n=0,
        created_at=clock(s),
    )
    s.add(adapter)
    try:
        s.flush()
    except IntegrityError as error:
        raise Conflict(
            f"You already have an adapter named '{request.name}'.", code="adapter_exists", param="name"
        ) from error
    return adapter


def by_name(s: Session, tenant_id: str, name: str) -> Adapter:
    """The tenant's living adapter of that name; another tenant's is as absent as none."""
    adapter = s.scalar(
        select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.name == name, Adapter.deleted_at.is_(None))
    )
    if adapter is None:
        raise not_found(name)
    return adapter


def not_found(name: str) -> NotFound:
    return NotFound(f"You have no adapter named '{name[:64]}'.", code="adapter_not_found", param="adapter")


def locked(s: Session, adapter_id: str) -> Adapter:
    """The row as it is now, and nobody else changes it before this transaction ends.

    `key_share`: rows that refer to it may be written meanwhile. A stronger lock waits for those, and they for it.
    """
    query = select(Adapter).where(Adapter.id == adapter_id).with_for_update(key_share=True)
    return s.scalars(query.execution_options(populate_existing=True)).one()


def listing(s: Session, tenant_id: str, after: str | None, limit: int) -> tuple[list[Adapter], bool]:
    """By creation, newest last; True when there are more."""
    query = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
    if after is not None:
        mark = s.scalar(select(Adapter.created_at).where(Adapter.tenant_id == tenant_id, Adapter.id == after))
        if mark is None:
            raise NotFound("No such adapter to continue after.", code="adapter_not_found", param="after")
        query = query.where((Adapter.created_at > mark) | ((Adapter.created_at == mark) & (Adapter.id > after)))
    rows = list(s.scalars(query.order_by(Adapter.created_at, Adapter.id).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def delete(s: Session, adapter: Adapter) -> None:
    """Gone for its tenant at once: open jobs are cancelled, a running one is fenced.

    Files go later, when no engine holds a version of it any more.
    """
    now, adapter = clock(s), locked(s, adapter.id)
    for job in s.scalars(select(Job).where(Job.adapter_id == adapter.id, Job.state.in_(transitions.OPEN))):
        transitions.cancelled(s, adapter, job, now)
    fence(s, adapter, now, "cancelled")
    events.record(s, adapter, "adapter.deleted", now)
    adapter.deleted_at = now


def fence(s: Session, adapter: Adapter, now: float, run_state: str) -> None:
    """Whatever runs on this adapter can change nothing any more."""
    if adapter.lease_run is not None:
        s.execute(
            update(Run).where(Run.id == adapter.lease_run, Run.state == "running").values(state=run_state, ended_at=now)
        )
    adapter.token += 1
    adapter.lease_run = None
    adapter.lease_until = None


def promote(s: Session, adapter: Adapter, n: int) -> None:
    """Alias and training head move to version `n` together: weights, optimizer state, served name.

    A run that is training on another head is fenced and its jobs are queued again, to be trained from `n`.
    """
    adapter = locked(s, adapter.id)
    move_head(s, adapter, n)
    events.record(s, adapter, "adapter.promoted", clock(s), version=n)
    set_live(s, adapter, n)


def move_head(s: Session, adapter: Adapter, n: int) -> None:
    """Training goes on from version `n`; what trains on another head is fenced and queued again."""
    now = clock(s)
    if adapter.lease_run is not None:
        for job in s.scalars(select(Job).where(Job.run_id == adapter.lease_run, Job.state == "running")):
            transitions.queued(s, adapter, job, now, "superseded")
    fence(s, adapter, now, "superseded")
    adapter.head_n = n


def set_live(s: Session, adapter: Adapter, n: int) -> None:
    """The alias points to version `n`, which the engine has loaded.

    Versions that it was trained from count as published too: what they learnt is served, even where training was
    faster than publishing and the engine never saw them.
    """
    adapter.live_n = n
    now = clock(s)
    while n:
        version = s.get_one(Version, (adapter.id, n))
        if version.status != "pending":
            break
        version.status, version.published_at = "published", now
        events.record(s, adapter, "version.published", now, version=n)
        n = version.parent_n


@dataclass(frozen=True)
class Pointers:
    """What the publisher looks at."""

    adapter_id: str
    base_model: str
    head_n: int
    live_n: int


def pointers(s: Session) -> list[Pointers]:
    """Every living adapter that has a version. While a rebuild is held back, what is live counts as the head."""
    replaying = exists().where(
        Job.adapter_id == Adapter.id, Job.state.in_(("queued", "running")), Job.seq <= Adapter.held_until_seq
    )
    head = case((replaying, Adapter.live_n), else_=Adapter.head_n)
    rows = s.execute(
        select(Adapter.id, Adapter.base_model, head, Adapter.live_n).where(
            Adapter.deleted_at.is_(None), (Adapter.live_n > 0) | (Adapter.head_n > 0)
        )
    )
    return [Pointers(*row) for row in rows]


def view(adapter: Adapter) -> wire.Adapter:
    return wire.Adapter(
        id=adapter.id,
        name=adapter.name,
        base_model=adapter.base_model,
        live_version=adapter.live_n,
        head_version=adapter.head_n,
        queued_jobs=adapter.open_jobs,
        paused=adapter.paused_at is not None,
        blocked_by=adapter.blocked_by,
        on_failure=adapter.on_failure,
        lora=LoraSettings.model_validate(adapter.lora),
        training=TrainingSettings.model_validate(adapter.training),
        created_at=int(adapter.created_at),
    )
