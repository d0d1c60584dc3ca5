"""Jobs as their clients see them."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

import api_schemas.jobs as wire
from api_schemas.preview import Preview
from service.db.engine import clock
from service.db.tables import Adapter, Job, Run, Step, Version, Worker
from service.errors import Conflict, NotFound
from service.store import leases


def of_tenant(s: Session, tenant_id: str, job_id: str) -> Job:
    job = s.get(Job, job_id)
    if job is None or job.tenant_id != tenant_id:
        raise NotFound("You have no job of that id.", code="job_not_found", param="job")
    return job


def listing(
    s: Session, tenant_id: str, *, adapter_id: str | None, status: str | None, after: str | None, limit: int
) -> tuple[list[Job], bool]:
    """Newest first; True when there are more."""
    query = select(Job).where(Job.tenant_id == tenant_id)
    if adapter_id is not None:
        query = query.where(Job.adapter_id == adapter_id)
    if status is not None:
        query = query.where(Job.state == status)
    if after is not None:
        mark = of_tenant(s, tenant_id, after)
        query = query.where(
            (Job.created_at < mark.created_at) | ((Job.created_at == mark.created_at) & (Job.id < mark.id))
        )
    rows = list(s.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def cancel(s: Session, job: Job) -> None:
    """Idempotent for a cancelled job; a job that has ended otherwise is a Conflict."""
    if job.state == "cancelled":
        return
    if job.state not in ("queued", "running"):
        raise Conflict(f"The job has already {job.state}.", code="job_ended", param="job")
    leases.cancel(s, job)


def workers_seen(s: Session, base_model: str, within: float) -> int:
    """Workers of this base that called in the last `within` seconds."""
    since = clock(s) - within
    return len(s.scalars(select(Worker.id).where(Worker.base_model == base_model, Worker.last_seen_at >= since)).all())


def view(s: Session, job: Job, *, with_result: bool = False) -> wire.Job:
    """`with_result`: a preview's too, which is large."""
    run = s.get(Run, job.run_id) if job.run_id is not None else None
    steps = list(s.scalars(select(Step).where(Step.run_id == job.run_id).order_by(Step.step)))
    version = s.get(Version, (job.adapter_id, job.version_n)) if job.version_n is not None else None
    return wire.Job(
        id=job.id,
        kind=job.kind,
        adapter=s.get_one(Adapter, job.adapter_id).name,
        batch_id=job.batch_id,
        status=job.state,
        sequence=job.seq,
        priority=job.priority,
        attempts=job.attempts,
        progress=wire.JobProgress.model_validate(run.progress) if run and run.progress else None,
        metrics=[wire.StepMetrics.model_validate(step.metrics) for step in steps],
        version=job.version_n,
        published=version is not None and version.published_at is not None,
        error=wire.JobError.model_validate(job.error) if job.error else None,
        result=Preview.model_validate(job.result) if with_result and job.result else None,
        created_at=int(job.created_at),
        started_at=int(job.started_at) if job.started_at else None,
        finished_at=int(job.finished_at) if job.finished_at else None,
    )
