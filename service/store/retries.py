"""What becomes of jobs whose run came to nothing, and what people decide about it afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from api_schemas.jobs import JobError
from service.db.engine import clock
from service.db.tables import Adapter, Application, Job
from service.errors import Conflict, NotFound
from service.store import events, queue, transitions
from service.store.adapters import locked
from service.store.rules import Rules

MAX_PAUSE = 3600.0
"""Seconds: pauses between attempts stop doubling here."""
MAX_CODE, MAX_MESSAGE = 64, 4000
"""Characters of an error that are kept."""


def pause(backoff: float, attempts: int) -> float:
    """Seconds to wait after so many failed attempts: doubling, with jitter so that what failed at once spreads out."""
    full = min(backoff * 2.0 ** max(0, attempts - 1), MAX_PAUSE)
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret hangs on it


def set_back(
    s: Session, adapter: Adapter, jobs: Sequence[Job], error: JobError, rules: Rules, *, retryable: bool, apart: bool
) -> None:
    """One attempt is used up: the jobs of the run are queued again, or become dead letters.

    Jobs that were trained together never become dead letters together: one bad item would take the others along. When
    they may not be tried together any more (`apart`, or their attempts are used up), each is tried alone once at least.
    """
    code, message = error.code[:MAX_CODE], error.message[:MAX_MESSAGE]
    now = clock(s)
    last = any(job.attempts + 1 >= rules.max_attempts for job in jobs)
    split = len(jobs) > 1 and (apart or last)
    for job in jobs:
        job.attempts += 1
        if split:
            job.together, job.attempts = job.id, min(job.attempts, rules.max_attempts - 1)
        if split or (retryable and not last):
            job.error = {"code": code, "message": message}
            transitions.queued(s, adapter, job, now, code)
        else:
            transitions.failed(s, adapter, job, now, code, message)


def hold_off(s: Session, adapter: Adapter, jobs: Sequence[Job], rules: Rules) -> None:
    """Nothing of the adapter runs before the pause after its latest failure is over.

    Where training waits, a preview's failure makes no pause: the training runs next anyway.
    """
    if jobs[0].kind == "preview" and queue.training_waits(s, adapter):
        return
    if waiting := [job.attempts for job in jobs if job.state == "queued"]:
        adapter.run_after = clock(s) + pause(rules.backoff, max(waiting))


def requeue(s: Session, job: Job) -> None:
    """A dead letter is tried again, alone, with all its attempts. Raises Conflict, NotFound.

    It takes its old place, unless feedback that came later has been learnt or is being learnt: then a new one at the
    end, since versions are in the order of sequence numbers.
    """
    adapter = locked(s, job.adapter_id)
    s.refresh(job)  # read before the lock was ours
    if adapter.deleted_at is not None:
        raise NotFound(f"Adapter '{adapter.name}' was deleted.", code="adapter_not_found", param="job")
    if job.state != "failed":
        raise Conflict(f"Only failed jobs can be queued again; this one is {job.state}.", code="job_not_failed")
    # What a rejected version learnt was undone: its application does not count any more.
    s.execute(delete(Application).where(Application.job_id == job.id))
    if _overtaken(s, job):
        job.seq, adapter.next_seq = adapter.next_seq, adapter.next_seq + 1
    job.attempts, job.together, job.version_n, job.finished_at = 0, job.id, None, None
    now = clock(s)
    if adapter.open_jobs == 0:
        adapter.waits_since = now
    adapter.open_jobs += 1
    adapter.priority = max(adapter.priority, job.priority)
    adapter.run_after = 0.0
    if adapter.blocked_by == job.id:
        adapter.blocked_by = None
    transitions.queued(s, adapter, job, now, "requeued")


def _overtaken(s: Session, job: Job) -> bool:
    later = select(Job.id).where(
        Job.adapter_id == job.adapter_id,
        Job.seq > job.seq,
        Job.kind != "preview",
        Job.state.in_(("running", "succeeded")),
    )
    return s.scalars(later.limit(1)).first() is not None


def stop(s: Session, adapter: Adapter) -> None:
    """Queued work waits from now on; what runs already is finished. Again is harmless."""
    adapter = locked(s, adapter.id)
    if adapter.paused_at is None:
        adapter.paused_at = clock(s)
        events.record(s, adapter, "adapter.paused", adapter.paused_at)


def resume(s: Session, adapter: Adapter) -> None:
    """Queued work goes on: after a pause, or past the failed job that blocked it. Again is harmless."""
    adapter = locked(s, adapter.id)
    if adapter.paused_at is None and adapter.blocked_by is None:
        return
    adapter.paused_at = adapter.blocked_by = None
    adapter.waits_since = clock(s)
    events.record(s, adapter, "adapter.resumed", adapter.waits_since)
