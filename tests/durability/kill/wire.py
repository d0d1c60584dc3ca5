"""An HTTP proxy on a thread of its own that shows what passes and can hold it: the observer between two processes.

Product processes are pointed at it by the URLs that they are given anyway; nothing in them knows of it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn

HOP = {b"connection", b"content-length", b"transfer-encoding", b"host", b"keep-alive", b"date", b"server"}
Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """One request, and its answer once that is there."""

    path: str
    body: bytes
    status: int | None = None
    answer: bytes = b""

    def json(self, *, answer: bool = False) -> Any:
        return json.loads((self.answer if answer else self.body) or b"null")


Gate = Callable[[Seen], bool]
"""Sees a request before it goes on, and again with its answer before that goes back. True: let it pass; False: the
other side hears nothing but a 502. It may take its time: only this one exchange waits."""


class Proxy:
    """Forwards to `upstream`, on `port` of the loopback interface, while the block lasts."""

    def __init__(self, port: int, upstream: str, gate: Gate) -> None:
        self._upstream, self._gate = upstream, gate
        config = uvicorn.Config(
            self._app, "127.0.0.1", port, interface="asgi3", lifespan="off", log_config=None, log_level="error",
            access_log=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        async with httpx2.AsyncClient(base_url=self._upstream, timeout=120.0, trust_env=False) as self._client:
            await self._server.serve()

    async def _app(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """A whole exchange; answers are not streamed on. Whoever waits for one and goes away cancels it upstream."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        work = asyncio.ensure_future(self._exchange(scope, body))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            return
        gone.cancel()
        status, headers, answer = work.result()
        with suppress(OSError):
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

    async def _exchange(self, scope: Message, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        if not await asyncio.to_thread(self._gate, Seen(scope["path"], body)):
            return 502, [], b""
        headers = [(k, v) for k, v in scope["headers"] if k not in HOP]
        path = scope["path"] + (f"?{q.decode()}" if (q := scope["query_string"]) else "")
        try:
            found = await self._client.request(scope["method"], path, content=body, headers=headers)
        except httpx2.HTTPError:
            return 502, [], b""
        if not await asyncio.to_thread(self._gate, Seen(scope["path"], body, found.status_code, found.content)):
            return 502, [], b""
        kept = [(k, v) for k, v in found.headers.raw if k.lower() not in HOP | {b"content-encoding"}]
        return found.status_code, kept, found.content
