"""Feedback in."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import Header, Response

import api_schemas.feedback as wire
from api_schemas.base import IdempotencyKey
from api_schemas.jobs import Job
from api_schemas.preview import PreviewRequest
from service import ingest
from service.auth import Ctx, FeedbackTenant, JobsReader, guarded
from service.context import Context
from service.routes.ids import PathId
from service.store import feedback, jobs

router = guarded(tags=["feedback"])


@router.post("/v1/feedback", status_code=202, response_model=wire.FeedbackBatch)
async def submit_feedback(
    request: wire.FeedbackRequest,
    context: Ctx,
    tenant: FeedbackTenant,
    idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
) -> Response:
    """Keep a batch of remarks and queue its training. Acknowledged means on disk."""
    return await kept(context, tenant, request, idempotency_key)


async def kept(context: Context, tenant: str, request: wire.FeedbackRequest, idempotency_key: str | None) -> Response:
    """The answer, once the batch is on disk. `service.door` comes here by itself."""
    accepted = await ingest.submit(context, tenant, request, idempotency_key)
    context.work.ring()
    headers = {"idempotent-replayed": "true"} if accepted.replayed else None
    # Written once, not validated a second time on its way out.
    return Response(accepted.view.model_dump_json(exclude_none=True), 202, headers, "application/json")


@router.post("/v1/feedback/preview", status_code=202)
async def preview_feedback(
    request: PreviewRequest,
    response: Response,
    context: Ctx,
    tenant: FeedbackTenant,
    idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
) -> Job:
    """Queue a look at what a batch would teach. Nothing is learnt from it."""
    accepted = await ingest.submit(context, tenant, request, idempotency_key, "preview")
    context.work.ring()
    if accepted.replayed:
        response.headers["idempotent-replayed"] = "true"
    return await anyio.to_thread.run_sync(_job, context, tenant, accepted.view.job_id)


def _job(context: Context, tenant: str, job_id: str) -> Job:
    with context.database.read() as s:
        return jobs.view(s, jobs.of_tenant(s, tenant, job_id))


@router.get("/v1/feedback/{batch}")
def get_feedback(batch: PathId, context: Ctx, tenant: JobsReader) -> wire.FeedbackBatch:
    """A batch with its items and what became of it."""
    with context.database.read() as s:
        return feedback.view(s, feedback.batch_of_tenant(s, tenant, batch), with_items=True)
