"""Feedback in."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Response

import api_schemas.feedback as wire
from api_schemas.base import IdempotencyKey
from service.auth import Ctx, FeedbackTenant, JobsReader
from service.context import Context
from service.routes.ids import PathId
from service.store import feedback
from service.window import check_window

router = APIRouter(tags=["feedback"])


@router.post("/v1/feedback", status_code=202, response_model_exclude_none=True)
async def submit_feedback(
    request: wire.FeedbackRequest,
    response: Response,
    context: Ctx,
    tenant: FeedbackTenant,
    idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
) -> wire.FeedbackBatch:
    """Keep a batch of remarks and queue its training. Acknowledged means on disk."""
    await check_window(context, tenant, request)
    view, again = await anyio.to_thread.run_sync(_submit, context, tenant, request, idempotency_key)
    if again:
        response.headers["idempotent-replayed"] = "true"
    context.work.ring()
    return view


def _submit(
    context: Context, tenant: str, request: wire.FeedbackRequest, key: str | None
) -> tuple[wire.FeedbackBatch, bool]:
    with context.database.write() as s:
        batch, again = feedback.submit(
            s, tenant, request, idempotency_key=key, max_queued=context.settings.max_queued_jobs
        )
        return feedback.view(s, batch, with_items=False), again


@router.get("/v1/feedback/{batch}")
def get_feedback(batch: PathId, context: Ctx, tenant: JobsReader) -> wire.FeedbackBatch:
    """A batch with its items and what became of it."""
    with context.database.read() as s:
        return feedback.view(s, feedback.batch_of_tenant(s, tenant, batch), with_items=True)
