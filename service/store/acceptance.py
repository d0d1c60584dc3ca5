"""Feedback in, many requests in one transaction: each is accepted whole, refused, or found to have been here before.

Everything that a request can be refused for is decided before its rows are made, on rows that are locked, so that one
request's refusal leaves the others alone. In PostgreSQL tenants are locked first (one key, one batch), then adapters
(one order), each kind in the order of ids: two services that accept at once cannot lock each other out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Dialect, FromClause, select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

import api_schemas.feedback as wire
from api_schemas.jobs import JobKind
from api_schemas.training import TrainingSettings
from service.db.engine import db_now
from service.db.prepared import Prepared, Statement, inserted
from service.db.tables import Base, Tenant
from service.errors import PerennialError
from service.store import feedback, queue, replays, rollouts, targets
from service.store.ids import new_id
from service.store.targets import Target
from service.store.waiting import Limits, Waiting

Row = dict[str, Any]


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
    desk = _Desk(s.connection(), group, limits)
    outcomes = [desk.outcome(submission) for submission in group]
    desk.write()
    return outcomes


_TENANTS = Base.metadata.tables[Tenant.__tablename__].c


def _locked_tenants(_: Dialect, wanted: FromClause) -> Statement:
    # Weaker than FOR UPDATE: whoever inserts a row that refers to a tenant need not wait.
    ours = _TENANTS.id.in_(select(wanted.c.id))
    return select(_TENANTS.id, db_now()).where(ours).order_by(_TENANTS.id).with_for_update(key_share=True)


_LOCKED_TENANTS = Prepared(_locked_tenants, _TENANTS.id)
_COLUMNS = {
    "feedback_batches": "id tenant_id adapter_id idempotency_key body_hash training item_count created_at",
    "feedback_items": "id batch_id position rollout_id messages response feedback demonstration standing person",
    "jobs": "id tenant_id adapter_id kind batch_id seq priority attempts created_at state",
    "events": "adapter_id n type job_id version_n data created_at",
}
"""In the order that their references ask for."""
_INSERTS = {
    table: inserted(*(Base.metadata.tables[table].c[name] for name in names.split()))
    for table, names in _COLUMNS.items()
}


@lru_cache(1024)
def _resolved(of_adapter: str) -> str:
    """The settings of an adapter's ordinary batches, all filled in. Both are JSON."""
    return json.dumps(feedback.resolved_training(TrainingSettings.model_validate_json(of_adapter)).model_dump())


class _Desk:
    """One group: what was read for it, and the rows that it will leave."""

    def __init__(self, connection: Connection, group: Sequence[Submission], limits: Limits) -> None:
        self._connection = connection
        tenants = sorted({g.tenant_id for g in group})
        self._now = max(now for _, now in _LOCKED_TENANTS.run(connection, [{"id": t} for t in tenants]))
        keys = {(g.tenant_id, g.idempotency_key) for g in group if g.idempotency_key is not None}
        self._known = replays.known(connection, keys)
        self._accepted: dict[replays.Key, tuple[str, Accepted]] = {}
        self._answers = rollouts.known(
            connection, {n for g in group for i in g.request.items if (n := rollouts.named_by(i))}
        )
        given_by = {a.adapter_id for a in self._answers.values() if a.adapter_id is not None}
        named = {(g.tenant_id, g.request.adapter) for g in group if g.request.adapter is not None}
        self._targets = {t.id: t for t in targets.locked(connection, given_by, named)}
        self._open = Waiting(connection, limits)
        self._changed: dict[str, Target] = {}
        self._rows: dict[str, list[Row]] = {table: [] for table in _INSERTS}

    def outcome(self, submission: Submission) -> Outcome:
        try:
            return self._replayed(submission) or self._accept(submission)
        except PerennialError as error:
            return error

    def write(self) -> None:
        if self._changed:
            targets.save(self._connection, self._changed.values())
        for table, rows in self._rows.items():
            if rows:
                _INSERTS[table].run(self._connection, rows)

    def _replayed(self, submission: Submission) -> Accepted | None:
        """What the same key brought before. Raises Conflict when its body was another."""
        if submission.idempotency_key is None:
            return None
        key = (submission.tenant_id, submission.idempotency_key)
        if key in self._accepted:
            digest, first = self._accepted[key]
            feedback.check_body(digest, submission.digest)
            return Accepted(first.view, replayed=True)
        if (batch := self._known.get(key)) is None:
            return None
        digest, view = batch
        feedback.check_body(digest, submission.digest)
        return Accepted(view, replayed=True)

    def _accept(self, submission: Submission) -> Accepted | Doubtful:
        request, tenant_id = submission.request, submission.tenant_id
        answers = feedback.named_answers(tenant_id, request, self._answers)
        adapter = feedback.target_adapter(tenant_id, request, answers, self._targets)
        self._open.check(adapter)
        if long := _too_long(submission, answers):
            return Doubtful(long)
        training = self._training(adapter, request)
        batch_id = new_id("fb")
        job, event = queue.new_rows(adapter, batch_id, self._now, request.priority, submission.kind)
        self._open.add(tenant_id)
        self._changed[adapter.id] = adapter
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

    def _training(self, adapter: Target, request: wire.FeedbackRequest) -> str:
        """All settings filled in, as JSON."""
        if request.training is None:
            return _resolved(adapter.training)
        of_adapter = TrainingSettings.model_validate_json(adapter.training)
        return json.dumps(feedback.resolved_training(of_adapter, request.training).model_dump())


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
