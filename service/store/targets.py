"""Adapters as feedback sees them: read and locked for a group of requests, counted in, written back."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import Dialect, FromClause, Text, cast, select, tuple_
from sqlalchemy.engine import Connection

from service.db.prepared import Prepared, Statement
from service.db.tables import Adapter, Base


@dataclass
class Target:
    """What feedback has to know of an adapter, and what it counts there; its row is locked."""

    id: str
    tenant_id: str
    name: str
    base_model: str
    training: str
    """The adapter's settings, as JSON."""
    deleted_at: float | None
    next_seq: int
    open_jobs: int
    priority: int
    waits_since: float
    events_n: int


_TABLE = Base.metadata.tables[Adapter.__tablename__]
_C = _TABLE.c
_COUNTED = ("next_seq", "open_jobs", "priority", "waits_since", "events_n")


def _named(_: Dialect, wanted: FromClause) -> Statement:
    return select(_C.id).where(
        tuple_(_C.tenant_id, _C.name).in_(select(wanted.c.tenant_id, wanted.c.name)), _C.deleted_at.is_(None)
    )


def _locked(_: Dialect, wanted: FromClause) -> Statement:
    columns = [cast(_C[n], Text) if n == "training" else _C[n] for n in Target.__dataclass_fields__]
    return select(*columns).where(_C.id.in_(select(wanted.c.id))).order_by(_C.id).with_for_update(key_share=True)


def _counted(_: Dialect, new: FromClause) -> Statement:
    return _TABLE.update().values({n: new.c[n] for n in _COUNTED}).where(_C.id == new.c.id)


_NAMED, _LOCKED = Prepared(_named, _C.tenant_id, _C.name), Prepared(_locked, _C.id)
_COUNT = Prepared(_counted, _C.id, *(_C[n] for n in _COUNTED))


def locked(connection: Connection, ids: Collection[str], names: Collection[tuple[str, str]]) -> list[Target]:
    """Those of these ids, and those that are alive under these names of (tenant, adapter), in the order of ids."""
    wanted = set(ids)
    if names:
        pairs = [{"tenant_id": tenant, "name": name} for tenant, name in sorted(names)]
        wanted |= {row[0] for row in _NAMED.run(connection, pairs)}
    if not wanted:
        return []
    return [Target(*row) for row in _LOCKED.run(connection, [{"id": n} for n in sorted(wanted)])]


def save(connection: Connection, targets: Iterable[Target]) -> None:
    """Write what was counted. The rows are still locked."""
    _COUNT.run(connection, [{"id": t.id} | {n: getattr(t, n) for n in _COUNTED} for t in targets])
