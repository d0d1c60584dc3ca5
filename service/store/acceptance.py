"""Feedback in, many requests in one transaction: each is accepted whole, refused, or found to have been here before.

Everything that a request can be refused for is decided before its rows are made, on rows that are locked, so that one
request's refusal leaves the others alone. In PostgreSQL tenants are locked first (one key, one batch), then adapters
(one order), each kind in the order of ids: two services that accept at once cannot lock each other out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy.orm import Session

import api_schemas.feedback as wire
from api_schemas.jobs import JobKind
from api_schemas.training import TrainingSettings
from service.db.engine import db_now
from service.db.tables import Adapter, Base, Batch, Tenant
from service.errors import PerennialError, TooMany
from service.store import feedback, queue, rollouts
from service.store.ids import new_id

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Most jobs that may wait: of one adapter, of one tenant, of all."""

    adapter_jobs: int
    tenant_jobs: int
    all_jobs: int


@dataclass(frozen=True)
class Submission:
    """One request to store feedback."""

    tenant_id: str
    request: wire.FeedbackRequest
    idempotency_key: str | None
    digest: str
    """`feedback.body_hash` of the request."""
    bounds: Sequence[int]
    """Most tokens that each item can need beside its stored answer; empty: known to fit."""
    window: int = 0
    """The model's; of no meaning without bounds."""
    people: Sequence[str | None] = ()
    """Per item, what is kept of its `user`; empty: none has one."""
    kind: JobKind = "train"


@dataclass(frozen=True)
class Accepted:
    view: wire.FeedbackBatch
    replayed: bool
    """The same key and body had been accepted before."""


@dataclass(frozen=True)
class Doubtful:
    """Nothing was stored: these items may be too long for the window. Position -> tokens of the stored answer."""

    known: dict[int, int]


Outcome = Accepted | Doubtful | PerennialError


def accept(s: Session, group: Sequence[Submission], limits: Limits) -> list[Outcome]:
    """One outcome per submission, in order; true once the transaction is committed."""
    desk = _Desk(s, group, limits)
    outcomes = [desk.outcome(submission) for submission in group]
    desk.write()
    return outcomes


# Built once: what is left of a request's cost is mostly statements.
_TENANTS = Tenant.__table__.c
_LOCKED_TENANTS = (
    select(_TENANTS.id, db_now())
    .where(_TENANTS.id.in_(bindparam("ids")))
    .order_by(_TENANTS.id)
    .with_for_update(key_share=True)
)
_BATCHES = select(Batch).where(Batch.tenant_id == bindparam("tenant"), Batch.idempotency_key.in_(bindparam("keys")))
_ADAPTERS = Adapter.__table__.c
_NAMED = select(_ADAPTERS.id).where(
    _ADAPTERS.tenant_id.in_(bindparam("tenants")),
    _ADAPTERS.name.in_(bindparam("names")),
    _ADAPTERS.deleted_at.is_(None),
)
_LOCKED_ADAPTERS = (
    select(Adapter)
    .where(Adapter.id.in_(bindparam("ids")))
    .order_by(Adapter.id)
    .with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)
_WAITING = (
    select(_ADAPTERS.tenant_id, func.sum(_ADAPTERS.open_jobs))
    .where(_ADAPTERS.open_jobs > 0)
    .group_by(_ADAPTERS.tenant_id)
)
_INSERTS = {n: insert(Base.metadata.tables[n]) for n in ("feedback_batches", "feedback_items", "jobs", "events")}
"""In the order that their references ask for."""


class _Desk:
    """One group: what was read for it, and the rows that it will leave."""

    def __init__(self, s: Session, group: Sequence[Submission], limits: Limits) -> None:
        self._s, self._limits = s, limits
        # Weaker than FOR UPDATE: whoever inserts a row that refers to a tenant need not wait.
        self._now = max(now for _, now in s.execute(_LOCKED_TENANTS, {"ids": sorted({g.tenant_id for g in group})}))
        self._known = {(b.tenant_id, b.idempotency_key): b for b in _batches(s, group)}
        self._accepted: dict[tuple[str, str | None], tuple[str, Accepted]] = {}
        self._answers = rollouts.known(s, {n for g in group for i in g.request.items if (n := rollouts.named_by(i))})
        self._adapters = _adapters(s, group, self._answers.values())
        self._open = _Open(s, limits)
        self._defaults: dict[str, Row] = {}
        self._rows: dict[str, list[Row]] = {table: [] for table in _INSERTS}

    def outcome(self, submission: Submission) -> Outcome:
        try:
            return self._replayed(submission) or self._accept(submission)
        except PerennialError as error:
            return error

    def write(self) -> None:
        self._s.flush()  # the adapters' counters
        for table, rows in self._rows.items():
            if rows:
                self._s.execute(_INSERTS[table], rows)

    def _replayed(self, submission: Submission) -> Accepted | None:
        """What the same key brought before. Raises Conflict when its body was another."""
        key = (submission.tenant_id, submission.idempotency_key)
        if key[1] is None:
            return None
        if key in self._accepted:
            digest, first = self._accepted[key]
            feedback.check_body(digest, submission.digest)
            return Accepted(first.view, replayed=True)
        if (batch := self._known.get(key)) is None:
            return None
        feedback.check_body(batch.body_hash, submission.digest)
        return Accepted(feedback.view(self._s, batch, with_items=False), replayed=True)

    def _accept(self, submission: Submission) -> Accepted | Doubtful:
        request, tenant_id = submission.request, submission.tenant_id
        answers = feedback.named_answers(tenant_id, request, self._answers)
        adapter = feedback.target_adapter(tenant_id, request, answers, self._adapters)
        self._open.check(adapter)
        if long := _too_long(submission, answers):
            return Doubtful(long)
        training = self._training(adapter, request)
        batch_id = new_id("fb")
        job, event = queue.new_rows(adapter, batch_id, self._now, request.priority, submission.kind)
        self._open.add(tenant_id)
        self._rows["feedback_batches"].append(
            {
                "id": batch_id,
                "tenant_id": tenant_id,
                "adapter_id": adapter.id,
                "idempotency_key": submission.idempotency_key,
                "body_hash": submission.digest,
                "training": training,
                "item_count": len(request.items),
                "created_at": self._now,
            }
        )
        self._rows["feedback_items"] += _items(batch_id, submission)
        self._rows["jobs"].append(job)
        self._rows["events"].append(event)
        view = wire.FeedbackBatch(
            id=batch_id,
            adapter=adapter.name,
            job_id=job["id"],
            status="queued",
            item_count=len(request.items),
            created_at=int(self._now),
        )
        done = Accepted(view, replayed=False)
        if submission.idempotency_key is not None:
            self._accepted[tenant_id, submission.idempotency_key] = (submission.digest, done)
        return done

    def _training(self, adapter: Adapter, request: wire.FeedbackRequest) -> Row:
        """All settings filled in; those of an adapter's ordinary batches are resolved once for the group."""
        known = self._defaults.get(adapter.id) if request.training is None else None
        if known is not None:
            return known
        of_adapter = TrainingSettings.model_validate(adapter.training)
        resolved = feedback.resolved_training(of_adapter, request.training).model_dump()
        if request.training is None:
            self._defaults[adapter.id] = resolved
        return resolved


class _Open:
    """How much waits already, what this group adds included."""

    def __init__(self, s: Session, limits: Limits) -> None:
        self._limits = limits
        self._jobs = {tenant: int(jobs) for tenant, jobs in s.execute(_WAITING)}
        self._all = sum(self._jobs.values())

    def check(self, adapter: Adapter) -> None:
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


def _batches(s: Session, group: Sequence[Submission]) -> list[Batch]:
    """Those that were stored under the group's keys."""
    keys: dict[str, set[str]] = {}
    for submission in group:
        if submission.idempotency_key is not None:
            keys.setdefault(submission.tenant_id, set()).add(submission.idempotency_key)
    found: list[Batch] = []
    for tenant_id, theirs in keys.items():
        found += s.scalars(_BATCHES, {"tenant": tenant_id, "keys": sorted(theirs)})
    return found


def _adapters(s: Session, group: Sequence[Submission], answers: Iterable[rollouts.Known]) -> list[Adapter]:
    """All that the group may be for, locked."""
    ids = {a.adapter_id for a in answers if a.adapter_id is not None}
    if names := {g.request.adapter for g in group if g.request.adapter is not None}:
        ids |= set(s.scalars(_NAMED, {"tenants": sorted({g.tenant_id for g in group}), "names": sorted(names)}))
    return list(s.scalars(_LOCKED_ADAPTERS, {"ids": sorted(ids)}))


def _items(batch_id: str, submission: Submission) -> list[Row]:
    people = submission.people or [None] * len(submission.request.items)
    pairs = zip(submission.request.items, people, strict=True)
    return [feedback.item_row(batch_id, n, item, person, submission.kind) for n, (item, person) in enumerate(pairs)]


def _too_long(submission: Submission, answers: dict[str, rollouts.Known]) -> dict[int, int]:
    """Position -> tokens of its stored answer, of the items that only a count can admit."""
    found = {}
    for n, (item, bound) in enumerate(zip(submission.request.items, submission.bounds, strict=False)):
        stored = answers.get(rollouts.named_by(item) or "")
        known = stored.tokens if stored else 0
        if known + bound > submission.window:
            found[n] = known
    return found
