"""Every change of a job's state, each with its event. The adapter's row is locked by the caller."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.tables import Adapter, Job, Run
from service.store import events

OPEN = ("queued", "running")


def queued(s: Session, adapter: Adapter, job: Job, now: float, why: str) -> None:
    """The job waits for a run: newly, or again."""
    job.state, job.started_at = "queued", None
    events.record(s, adapter, "job.queued", now, job=job, data={"why": why, "attempts": job.attempts})


def running(s: Session, adapter: Adapter, job: Job, run: Run, now: float) -> None:
    job.state, job.run_id, job.started_at = "running", run.id, now
    events.record(s, adapter, "job.running", now, job=job, data={"run_id": run.id, "attempt": job.attempts + 1})


def succeeded(s: Session, adapter: Adapter, job: Job, now: float, version: int | None) -> None:
    job.version_n, job.error = version, None
    _ended(s, adapter, job, "succeeded", now)
    events.record(s, adapter, "job.succeeded", now, job=job, version=version)


def failed(s: Session, adapter: Adapter, job: Job, now: float, code: str, message: str) -> None:
    """A dead letter. Where the adapter says `block`, nothing runs after it until somebody decides."""
    job.error = {"code": code, "message": message}
    _ended(s, adapter, job, "failed", now)
    events.record(s, adapter, "job.failed", now, job=job, version=job.version_n, data={"code": code})
    if adapter.on_failure == "block" and adapter.blocked_by is None and job.kind != "preview":
        adapter.blocked_by = job.id
        events.record(s, adapter, "adapter.blocked", now, job=job)


def cancelled(s: Session, adapter: Adapter, job: Job, now: float) -> None:
    _ended(s, adapter, job, "cancelled", now)
    events.record(s, adapter, "job.cancelled", now, job=job)


def _ended(
    s: Session, adapter: Adapter, job: Job, state: Literal["succeeded", "failed", "cancelled"], now: float
) -> None:
    was_open = job.state in OPEN
    job.state, job.finished_at = state, now
    if was_open:
        adapter.open_jobs -= 1
        if job.priority == adapter.priority > 0:
            adapter.priority = _highest(s, adapter)


def _highest(s: Session, adapter: Adapter) -> int:
    s.flush()
    return s.scalar(select(func.max(Job.priority)).where(Job.adapter_id == adapter.id, Job.state.in_(OPEN))) or 0
