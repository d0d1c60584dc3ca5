"""OpenAI's side: chat completions and the list of models."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from anyio import CancelScope
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api_schemas.base import ModelName
from api_schemas.chat import ChatRequest
from service.auth import ChatTenant, Ctx
from service.context import Context
from service.db.tables import Adapter
from service.errors import PerennialError
from service.gateway import Gateway, resolve_target
from service.problems import UNFORESEEN, InternalError, error_body
from service.store import adapters

log = logging.getLogger(__name__)
router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions")
async def chat_completions(request: ChatRequest, context: Ctx, tenant: ChatTenant) -> Response:
    """Answer with one version, say which, and keep the answer so that feedback can name it."""
    gateway = Gateway(context)
    if not request.stream:
        return JSONResponse(await gateway.complete(tenant, request))
    chunks = gateway.stream(tenant, request)
    first = await anext(chunks, None)  # what fails before the first token is an HTTP error, not a broken stream
    return EventStream(_server_sent(first, chunks))


class EventStream(StreamingResponse):
    """Ends its generator when the client hangs up: the engine stops, and the version may be unloaded."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self._events.aclose()


async def _server_sent(first: dict[str, Any] | None, rest: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str]:
    async with aclosing(rest):
        try:
            if first is not None:
                yield _event(first)
            async for chunk in rest:
                yield _event(chunk)
        except PerennialError as error:
            yield _event(error_body(error))
        except Exception as error:
            log.exception("unforeseen error in a stream", exc_info=error)
            yield _event(error_body(InternalError(UNFORESEEN)))
        else:
            yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


@router.get("/v1/models")
def list_models(context: Ctx, tenant: ChatTenant) -> dict[str, Any]:
    """The base model and the caller's adapters, in OpenAI's shape."""
    with context.database.read() as s:
        rows, _ = adapters.listing(s, tenant, None, context.settings.max_adapters)
    return {"object": "list", "data": [_base_model(context), *(_model(a) for a in rows)]}


@router.get("/v1/models/{model:path}")
def get_model(model: ModelName, context: Ctx, tenant: ChatTenant) -> dict[str, Any]:
    """One model by the name that a chat would use."""
    target = resolve_target(context, tenant, model)
    if target.adapter is None:
        return _base_model(context)
    with context.database.read() as s:
        return _model(adapters.by_name(s, tenant, target.adapter)) | {"id": model}


def _base_model(context: Context) -> dict[str, Any]:
    return {"id": context.base_model, "object": "model", "created": 0, "owned_by": "perennial", "parent": None}


def _model(adapter: Adapter) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": "perennial",
        "parent": adapter.base_model,
        "perennial": {"live_version": adapter.live_n},
    }
