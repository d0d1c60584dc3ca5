"""Versions: look-up, the publisher's verdict, and what their clients see."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Integer, Select, bindparam, select
from sqlalchemy.orm import Session

import api_schemas.adapters as wire
from api_schemas.jobs import StepMetrics
from service.db.engine import clock
from service.db.glance import Glance, plain
from service.db.tables import Adapter, Application, Job, Version
from service.errors import Gone, NotFound, Unprocessable
from service.store import events, feedback, transitions
from service.store.adapters import locked, move_head


def get(s: Session, adapter: Adapter, n: int) -> Version:
    version = s.get(Version, (adapter.id, n))
    if version is None:
        raise _unknown(adapter.name, n)
    return version


def _unknown(name: str, n: int) -> NotFound:
    return NotFound(f"Adapter '{name}' has no version {n}.", code="version_not_found", param="version")


class _State(Protocol):
    """Of a version: the row, or as much of it as was asked for."""

    @property
    def n(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def rejection(self) -> str | None: ...
    @property
    def files_doomed_at(self) -> float | None: ...


def servable(s: Session, adapter: Adapter, n: int) -> Version:
    """Like `get`, but refuses a version that the engine refused, or whose files are gone."""
    version = get(s, adapter, n)
    _check_servable(version)
    return version


def _check_servable(version: _State) -> None:
    if version.status == "rejected":
        raise Unprocessable(
            f"Version {version.n} was rejected: {version.rejection}", code="version_rejected", param="version"
        )
    _check_files(version)


def promotable(s: Session, adapter: Adapter, n: int) -> Version:
    """Like `servable`, but refuses a version that a rebuild has replaced."""
    version = servable(s, adapter, n)
    if version.retired_at is not None:
        raise Gone(f"Version {n} learnt from feedback that was erased; a rebuild has replaced it.", param="version")
    return version


def with_files(version: Version) -> Version:
    """Raises Gone when retention has taken its files."""
    _check_files(version)
    return version


def _check_files(version: _State) -> None:
    if version.files_doomed_at is not None:
        raise Gone(f"The files of version {version.n} were removed: old versions are not kept here.", param="version")


def _served(n: ColumnElement[int]) -> Select[str, str, int, int, str, str | None, float | None]:
    version = (Version.adapter_id == Adapter.id) & (Version.n == n)
    mine = (Adapter.tenant_id == bindparam("tenant")) & (Adapter.name == bindparam("name"))
    found = Version.n.label("found"), Version.status, Version.rejection, Version.files_doomed_at
    query = select(Adapter.id, Adapter.base_model, n.label("n"), *found).outerjoin(Version, version)
    return query.where(mine, Adapter.deleted_at.is_(None))


# Built once: putting a query together takes longer than running it.
_LIVE, _EXACTLY = _served(Adapter.live_n.expression), _served(bindparam("n", type_=Integer))
_LIVE_SQL, _EXACTLY_SQL = plain(_LIVE), plain(_EXACTLY)


@dataclass(frozen=True)
class Found:
    """What a name in a request stands for at this moment."""

    adapter_id: str
    base_model: str
    n: int
    """0: the base model itself."""


def find_served(s: Session, tenant_id: str, name: str, n: int | None) -> Found | None:
    """Version `n` (None: the live one) of the tenant's adapter of that name, if there is such an adapter.

    Raises NotFound, Gone, Unprocessable for a version that cannot be served. Every request waits for
    this: one query of a few columns.
    """
    query = _LIVE if n is None else _EXACTLY
    return _found(name, s.execute(query, {"tenant": tenant_id, "name": name, "n": n}).one_or_none())


def glance_served(glance: Glance, tenant_id: str, name: str, n: int | None) -> Found | None:
    """As `find_served`, on the event loop. Raises NotNow."""
    rows = glance.rows(_LIVE_SQL if n is None else _EXACTLY_SQL, {"tenant": tenant_id, "name": name, "n": n})
    return _found(name, SimpleNamespace(**rows[0]) if rows else None)


def _found(name: str, row: Any) -> Found | None:
    """What the row of `_served` says. Raises as `find_served`."""
    if row is None:
        return None
    if row.n and row.found is None:
        raise _unknown(name, row.n)
    if row.n:
        _check_servable(row)
    return Found(row.id, row.base_model, row.n)


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
    now = clock(s)
    events.record(s, adapter, "version.rejected", now, version=n, data={"code": code})
    applied = select(Application.job_id).where(Application.adapter_id == adapter_id, Application.version_n == n)
    for job in s.scalars(select(Job).where(Job.id.in_(applied)).order_by(Job.seq)):
        transitions.failed(s, adapter, job, now, code, reason)
    # Not to what is live: between the two there may be versions that are only not served yet.
    move_head(s, adapter, version.parent_n)


def feedback_of(s: Session, version: Version) -> tuple[list[str], list[str]]:
    """Ids of the batches and of the items that this version learnt from, also where they were erased since."""
    jobs = select(Application.job_id).where(
        Application.adapter_id == version.adapter_id, Application.version_n == version.n
    )
    batches = list(s.scalars(select(Job.batch_id).where(Job.id.in_(jobs)).order_by(Job.seq)))
    return batches, [item.id for item in feedback.items_of(s, batches, at=version.created_at)]


def view(s: Session, adapter: Adapter, version: Version) -> wire.Version:
    batches, items = feedback_of(s, version)
    return wire.Version(
        adapter=adapter.name,
        version=version.n,
        parent=version.parent_n,
        source=version.source,
        learnt_erased=version.tainted_at is not None,
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
