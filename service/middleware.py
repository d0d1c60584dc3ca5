"""Around every request: our own request id, and a bound on the body before anything parses it."""

from __future__ import annotations

import json
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import TooLarge
from service.problems import body_for

UPLOAD = re.compile(r"/v1/adapters/[^/]+/upload/[^/]+")


class RequestIds:
    """Mints `x-request-id`; a caller's own is not used as a key for anything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, named)


class BodyLimit:
    """Refuses bodies over `limit` bytes with 413, declared or not. Streamed uploads have a limit of their own."""

    def __init__(self, app: ASGIApp, limit: int, uploads: int) -> None:
        self._app = app
        self._limit = limit
        self._uploads = uploads

    def _limit_of(self, scope: Scope) -> int:
        upload = scope["method"] == "PUT" and UPLOAD.fullmatch(scope["path"])
        return self._uploads if upload else self._limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope)
        declared = Headers(scope=scope).get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > limit:
            await self._refuse(scope, send, limit)
            return
        taken, refused = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            # Whoever reads the body sees a client that has gone, gives up, and its answer is replaced below.
            return message if taken <= limit else {"type": "http.disconnect"}

        async def replaced(message: Message) -> None:
            nonlocal refused
            if taken <= limit:
                await send(message)
            elif not refused:
                refused = True
                await self._refuse(scope, send, limit)

        await self._app(scope, counted, replaced)

    async def _refuse(self, scope: Scope, send: Send, limit: int) -> None:
        error = TooLarge(f"The body is larger than {limit} bytes: send smaller batches.")
        body = json.dumps(body_for(scope["path"], error)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
