"""OpenAI's side: chat and text completions."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from api_schemas.chat import ChatRequest
from api_schemas.completions import CompletionRequest
from service import room
from service.asks import Ask, chat_ask, text_ask
from service.auth import ChatTenant, Ctx, guarded
from service.context import Context
from service.disconnect import unless_gone
from service.errors import PerennialError
from service.gateway import Gateway
from service.problems import UNFORESEEN, InternalError, error_body
from service.sse import DONE, EventStream, encoded, event
from service.straight import Straight

Json = dict[str, Any]
log = logging.getLogger(__name__)
router = guarded(route_class=Straight, tags=["chat"])


@router.post("/v1/chat/completions")
async def chat_completions(request: ChatRequest, http: Request, context: Ctx, tenant: ChatTenant) -> Response:
    """Answer with one version, say which, and keep the answer so that feedback can name it."""
    return await _answer(http, context, tenant, chat_ask(request, context.sampling_defaults))


@router.post("/v1/completions")
async def completions(request: CompletionRequest, http: Request, context: Ctx, tenant: ChatTenant) -> Response:
    """Continue a text; kept as well, but feedback needs a conversation."""
    return await _answer(http, context, tenant, text_ask(request, context.sampling_defaults))


async def _answer(http: Request, context: Context, tenant: str, ask: Ask) -> Response:
    if ask.store:
        room.check(context.settings)
    gateway = Gateway(context)
    if not ask.stream:
        whole = await unless_gone(http.receive, gateway.complete(tenant, ask))
        return Response(encoded(whole), media_type="application/json")
    head, parts = await gateway.stream(tenant, ask)
    # What fails before the first token is an HTTP error, not a broken stream.
    first = await unless_gone(http.receive, anext(parts))
    return EventStream(_server_sent(head, first, parts))


async def _server_sent(head: Json, first: list[Json], rest: AsyncGenerator[list[Json]]) -> AsyncGenerator[bytes]:
    opening = b"data: " + encoded(head)[:-1] + b","  # alike in all parts, so written once

    def written(parts: list[Json]) -> bytes:
        return b"".join([b"%b%b\n\n" % (opening, encoded(part)[1:]) for part in parts])

    async with aclosing(rest):
        try:
            yield written(first)
            async for parts in rest:
                yield written(parts)
        except PerennialError as error:
            yield event(error_body(error))
        except Exception as error:
            log.exception("unforeseen error in a stream", exc_info=error)
            yield event(error_body(InternalError(UNFORESEEN)))
        else:
            yield DONE
