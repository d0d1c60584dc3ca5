"""Feedback on its way to the disk: many requests' in one transaction, each answered when its own is durable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import api_schemas.feedback as wire
from api_schemas.jobs import JobKind
from service import room, window
from service.db.engine import Database
from service.gathered import Gathered
from service.settings import Settings
from service.store import feedback
from service.store.acceptance import Accepted, Doubtful, Outcome, Submission, accept
from service.store.waiting import Limits

if TYPE_CHECKING:
    from service.context import Context

GROUP_ITEMS = 2048
"""Most items of one transaction: it must not keep other writers waiting."""
HEAVY = 4096
"""Bytes that count as one item more: on its way into the database a text is in memory several times over."""
PATIENCE = 0.002
"""Seconds that a group waits for company when there was some before: what a transaction takes even on a fast disk."""
Ingest = Gathered[Submission, Accepted | Doubtful]


def gatherer(database: Database, settings: Settings) -> Ingest:
    limits = Limits(settings.max_queued_jobs, settings.max_tenant_jobs, settings.max_open_jobs)

    def store(group: Sequence[Submission]) -> list[Outcome]:
        room.check(settings)
        with database.write() as s:
            return accept(s, group, limits)

    return Gathered("ingest", store, most=GROUP_ITEMS, room=settings.max_waiting_items, patience=PATIENCE)


async def submit(
    context: Context, tenant_id: str, request: wire.FeedbackRequest, key: str | None, kind: JobKind = "train"
) -> Accepted:
    """Store the batch and queue its job: on disk when this returns."""
    size = await context.engine.window(context.base_model)
    bounds = [window.bound(item) for item in request.items] if size is not None else []  # else the worker checks
    people = [context.keys.pseudonym(tenant_id, item.user) if item.user else None for item in request.items]
    meaning = feedback.meaning(request, kind)
    weight = len(request.items) + len(meaning) // HEAVY
    submission = Submission(tenant_id, request, key, feedback.digest(meaning), bounds, size or 0, people, kind)
    del meaning  # as large as the body: it need not wait along
    outcome = await context.ingest.submit(submission, weight)
    if isinstance(outcome, Doubtful):
        await window.check(context.engine, context.base_model, submission.window, request, outcome.known)
        outcome = await context.ingest.submit(replace(submission, bounds=()), weight)
    assert isinstance(outcome, Accepted)  # noqa: S101 - without bounds nothing is doubtful
    return outcome
