"""Jobs: what training is doing and did."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

import api_schemas.jobs as wire
from api_schemas.base import AdapterName
from service.auth import Ctx, JobsReader, JobsWriter
from service.routes.ids import PathId, QueryId
from service.store import adapters, jobs

router = APIRouter(tags=["jobs"])


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
        return jobs.view(s, jobs.of_tenant(s, tenant, job))


@router.post("/v1/jobs/{job}/cancel")
def cancel_job(job: PathId, context: Ctx, tenant: JobsWriter) -> wire.Job:
    """End a queued or running job: nothing of it is applied."""
    with context.database.write() as s:
        row = jobs.of_tenant(s, tenant, job)
        jobs.cancel(s, row)
        s.flush()
        view = jobs.view(s, row)
    context.work.ring()
    return view
