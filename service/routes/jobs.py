"""Jobs: what training is doing and did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Header, Query, Response
from sqlalchemy.orm import Session

import api_schemas.jobs as wire
from api_schemas.base import AdapterName
from service import job_events as job_events_
from service.auth import Ctx, JobsReader, JobsWriter, guarded
from service.context import Context
from service.db.tables import Job
from service.routes.ids import PathId, QueryId
from service.sse import EventStream
from service.store import adapters, jobs, retries

router = guarded(tags=["jobs"])


@router.get("/v1/jobs")
def list_jobs(
    context: Ctx,
    tenant: JobsReader,
    adapter: AdapterName | None = None,
    status: wire.JobStatus | None = None,
    after: QueryId = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> wire.Page[wire.Job]:
    """Newest first."""
    with context.database.read() as s:
        adapter_id = adapters.by_name(s, tenant, adapter).id if adapter else None
        rows, more = jobs.listing(s, tenant, adapter_id=adapter_id, status=status, after=after, limit=limit)
        return wire.Page[wire.Job](data=[jobs.view(s, j) for j in rows], has_more=more)


@router.get("/v1/jobs/{job}")
def get_job(job: PathId, context: Ctx, tenant: JobsReader) -> wire.Job:
    with context.database.read() as s:
        return jobs.view(s, jobs.of_tenant(s, tenant, job), with_result=True)


@router.get("/v1/jobs/{job}/events", status_code=200, response_class=EventStream)
def job_events(
    job: PathId,
    context: Ctx,
    tenant: JobsReader,
    last_event_id: Annotated[str | None, Header(pattern=job_events_.POSITION)] = None,
) -> Response:
    """What happened and happens to the job, as server-sent events: `wire.Event`, `JobStep`, `JobPhase`."""
    after = job_events_.Position.parse(last_event_id)
    with context.database.read() as s:
        jobs.of_tenant(s, tenant, job)
        news = job_events_.look(s, job, after)
    if news.ended and not news.items:
        return Response(status_code=204)  # tells a browser's EventSource not to come again
    return EventStream(job_events_.stream(context, job, after))


@router.post("/v1/jobs/{job}/cancel")
def cancel_job(job: PathId, context: Ctx, tenant: JobsWriter) -> wire.Job:
    """End a queued or running job: nothing of it is applied."""
    return _changed(context, tenant, job, jobs.cancel)


@router.post("/v1/jobs/{job}/requeue")
def requeue_job(job: PathId, context: Ctx, tenant: JobsWriter) -> wire.Job:
    """Try a failed job again, alone and with all its attempts, at its old place where that is still possible."""
    return _changed(context, tenant, job, retries.requeue)


def _changed(context: Context, tenant: str, job: str, change: Callable[[Session, Job], None]) -> wire.Job:
    """The job after `change`; whoever waits for work looks again."""
    with context.database.write() as s:
        row = jobs.of_tenant(s, tenant, job)
        change(s, row)
        s.flush()
        view = jobs.view(s, row)
    context.work.ring()
    return view
