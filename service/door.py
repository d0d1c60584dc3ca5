"""Feedback's own way in: what is plain and right does not go through the framework.

To find a route, solve its dependencies and read JSON takes the framework as much computing as it takes to check a batch
of feedback, keep it and answer. So a POST of feedback with a good key, `application/json` and a valid body is answered
here. Anything else, whatever is wrong with it, goes on to the ordinary route with the body that was read: there is one
place that says what is wrong. The key comes before the body here too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_schemas.feedback import FeedbackRequest
from service.auth import FEEDBACK_SCOPE, owner_of
from service.context import Context
from service.errors import PerennialError
from service.problems import answer, of_defect, of_storage
from service.routes.feedback import kept

PATH = "/v1/feedback"
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_READ = frozenset({b"authorization", b"content-type", b"idempotency-key"})


@dataclass(frozen=True)
class Asked:
    """From the headers of a request that is plain."""

    api_key: str
    idempotency_key: str | None


class FeedbackDoor:
    """Around the application, within the bounds of `service.middleware`."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            response, receive = await self._answered(scope, receive)
        except PerennialError as error:
            response = answer(Request(scope), error)
        except OSError as error:
            response = answer(Request(scope), of_storage(error))
        except Exception as error:
            response = answer(Request(scope), of_defect(error))
        await (response or self._app)(scope, receive, send)

    async def _answered(self, scope: Scope, receive: Receive) -> tuple[Response | None, Receive]:
        """No answer: the ordinary route has one, to what is to be received."""
        if (asked := _plain(scope)) is None or (tenant := await self._tenant(asked)) is None:
            return None, receive
        messages = await _read(receive)
        if (request := _valid(messages)) is None:
            return None, _again(messages, receive)
        messages.clear()  # they hold the body, which need not wait for the disk as well
        return await kept(self._context, tenant, request, asked.idempotency_key), receive

    async def _tenant(self, asked: Asked) -> str | None:
        """Whose the key is, where it may send feedback."""
        owner = await owner_of(self._context, asked.api_key)
        return owner.tenant_id if owner is not None and FEEDBACK_SCOPE in owner.scopes else None


def _plain(scope: Scope) -> Asked | None:
    found = {}
    for name, value in scope["headers"]:
        if name in _READ:
            if name in found:
                return None
            found[name] = value
    scheme, _, token = found.get(b"authorization", b"").partition(b" ")
    key = found.get(b"idempotency-key")
    if scheme != b"Bearer" or found.get(b"content-type") != b"application/json":
        return None
    if key is not None and not _KEY.fullmatch(key):
        return None
    return Asked(token.decode("latin-1").strip(), key.decode() if key is not None else None)


async def _read(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _valid(messages: list[Message]) -> FeedbackRequest | None:
    if messages[-1]["type"] != "http.request":  # the client has gone, or its body is too large
        return None
    body = messages[0]["body"] if len(messages) == 1 else b"".join(m.get("body", b"") for m in messages)
    try:
        return FeedbackRequest.model_validate_json(body)
    except ValidationError:
        return None


def _again(messages: list[Message], receive: Receive) -> Receive:
    """What was read, then what comes."""
    left = iter(messages)

    async def replayed() -> Message:
        return next(left, None) or await receive()

    return replayed
