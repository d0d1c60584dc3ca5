"""Anthropic's side: messages, for agents that speak it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError

from api_schemas.chat import ChatRequest
from api_schemas.messages import MessagesRequest
from service import anthropic, room
from service.asks import Ask, chat_ask
from service.auth import ChatTenant, Ctx, guarded
from service.disconnect import unless_gone
from service.errors import PerennialError
from service.gateway import Gateway
from service.problems import UNFORESEEN, InternalError, from_validation
from service.sse import EventStream, encoded, event
from service.straight import Straight

Json = dict[str, Any]
log = logging.getLogger(__name__)
router = guarded(route_class=Straight, tags=["chat"])


@router.post("/v1/messages")
async def messages(request: MessagesRequest, http: Request, context: Ctx, tenant: ChatTenant) -> Response:
    """Answer with one version and keep the answer: its `id` is what feedback names as `completion_id`."""
    ask, gateway = _ask(request, context.sampling_defaults), Gateway(context)
    if ask.store:
        room.check(context.settings)
    if not ask.stream:
        whole = await unless_gone(http.receive, gateway.complete(tenant, ask))
        return Response(encoded(anthropic.message(whole)), media_type="application/json")
    head, parts = await gateway.stream(tenant, ask)
    first = await unless_gone(http.receive, anext(parts))
    return EventStream(_events(anthropic.MessageStream(head), first, parts))


def _ask(request: MessagesRequest, defaults: Any) -> Ask:
    try:
        chat = ChatRequest.model_validate(request.as_chat())
    except ValidationError as error:
        raise from_validation([e | {"loc": ("body", *e["loc"])} for e in error.errors()]) from error
    # Ids and usage are asked for ourselves: the counts in `message_start` and `message_delta` come of them.
    return replace(chat_ask(chat, defaults), id_prefix="msg_", show_token_ids=True, show_usage=True)


async def _events(
    stream: anthropic.MessageStream, first: list[Json], rest: AsyncGenerator[list[Json]]
) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        try:
            yield _written(stream.start(first[0] if first else {}))
            yield _written(e for part in first for e in stream.take(part))
            async for parts in rest:
                if written := _written(e for part in parts for e in stream.take(part)):
                    yield written
        except PerennialError as error:
            yield event(anthropic.error_body(error), "error")
        except Exception as error:
            log.exception("unforeseen error in a stream", exc_info=error)
            yield event(anthropic.error_body(InternalError(UNFORESEEN)), "error")
        else:
            yield _written(stream.end())


def _written(events: Iterable[tuple[str, Json]]) -> bytes:
    return b"".join(event({"type": name} | data, name) for name, data in events)
