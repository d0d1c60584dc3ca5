"""How much waits, and how much may."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Dialect, FromClause, func, select
from sqlalchemy.engine import Connection

from service.db.prepared import Prepared, Statement
from service.db.tables import Adapter, Base
from service.errors import TooMany
from service.store.targets import Target


@dataclass(frozen=True)
class Limits:
    """Most jobs that may wait: of one adapter, of one tenant, of all."""

    adapter_jobs: int
    tenant_jobs: int
    all_jobs: int


def _open_jobs(_: Dialect, __: FromClause) -> Statement:
    c = Base.metadata.tables[Adapter.__tablename__].c
    return select(c.tenant_id, func.sum(c.open_jobs)).where(c.open_jobs > 0).group_by(c.tenant_id)


_OPEN_JOBS = Prepared(_open_jobs)


class Waiting:
    """How much waits already, what this group adds included."""

    def __init__(self, connection: Connection, limits: Limits) -> None:
        self._limits = limits
        self._jobs = {tenant: int(jobs) for tenant, jobs in _OPEN_JOBS.run(connection)}
        self._all = sum(self._jobs.values())

    def check(self, adapter: Target) -> None:
        """Raises TooMany, with what would have to be done first."""
        if adapter.open_jobs >= self._limits.adapter_jobs:
            raise TooMany(f"{adapter.open_jobs} batches wait for '{adapter.name}': send more later.", retry_after=30)
        if (mine := self._jobs.get(adapter.tenant_id, 0)) >= self._limits.tenant_jobs:
            raise TooMany(f"{mine} batches of yours wait for training: send more later.", retry_after=30)
        if self._all >= self._limits.all_jobs:
            raise TooMany("The queue of this service is full: send more later.", code="queue_full", retry_after=60)

    def add(self, tenant_id: str) -> None:
        self._jobs[tenant_id] = self._jobs.get(tenant_id, 0) + 1
        self._all += 1
