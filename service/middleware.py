"""Around every request: our own request id, and a bound on the body before anything parses it."""

from __future__ import annotations

import json
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import PerennialError, TooLarge, TooMany
from service.problems import body_for
from service.settings import Settings

UNCOUNTED = frozenset({"/healthz", "/readyz"})
"""A busy service is not a dead one."""
BUSY = "The service has as much to do as it can hold: send it again in a moment."
UPLOAD = re.compile(r"/v1/adapters/[^/]+/upload/[^/]+|/worker/v1/runs/[^/]+/files/[^/]+")


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
            try:
                await send(message)
            except RuntimeError as error:
                # Reset by the client a moment ago, of which uvicorn, which drops what nobody reads, is told next.
                if "the handler is closed" not in str(error):
                    raise

        await self._app(scope, receive, named)


class Limits:
    """Bounds what requests take of the memory: one body (413), all bodies together and all requests (429).

    Streamed uploads have a limit of their own, and are not kept in memory.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._body, self._uploads = settings.max_body_bytes, settings.max_upload_bytes
        self._most_held, self._most_requests = settings.max_held_bytes, settings.max_requests
        self._held = self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self._app(scope, receive, send)
        elif self._requests >= self._most_requests:
            await _refuse(scope, send, TooMany(BUSY, code="service_busy", retry_after=1))
        else:
            self._requests += 1
            try:
                await self._bounded(scope, receive, send)
            finally:
                self._requests -= 1

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = scope["method"] == "PUT" and UPLOAD.fullmatch(scope["path"]) is not None
        limit = self._uploads if upload else self._body
        declared = Headers(scope=scope).get("content-length", "0")
        size = int(declared[:20]) if declared.isascii() and declared.isdigit() else limit + 1
        if (refusal := self._refusal(size, limit, 0 if upload else size)) is not None:
            await _refuse(scope, send, refusal)
            return
        taken, refused = 0, False
        broken: list[PerennialError] = []
        """Why the rest of the body is not taken."""

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            piece = len(message.get("body", b""))
            taken += piece
            if (reason := self._refusal(taken, limit, 0 if upload else piece)) is not None:
                broken.append(reason)
            self._held += 0 if upload else piece
            # Whoever reads the body sees a client that has gone, gives up, and its answer is replaced below.
            return {"type": "http.disconnect"} if broken else message

        async def replaced(message: Message) -> None:
            nonlocal refused
            if not broken:
                await send(message)
            elif not refused:
                refused = True
                await _refuse(scope, send, broken[0])

        try:
            await self._app(scope, counted, replaced)
        finally:
            self._held -= 0 if upload else taken

    def _refusal(self, size: int, limit: int, more: int) -> PerennialError | None:
        """Why a body of this size, or `more` of it, is not taken."""
        if size > limit:
            return TooLarge(f"The body is larger than {limit} bytes: send smaller batches.")
        if more and self._held + more > self._most_held:
            return TooMany(BUSY, code="service_busy", retry_after=1)
        return None


async def _refuse(scope: Scope, send: Send, error: PerennialError) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body_for(scope["path"], error)).encode()})
