"""The service on the test's own event loop, over the raw protocol: when is what sent, and what if a client hangs up?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from service.app import create_app
from service.context import Context
from service.store.keys import CLIENT_SCOPES, WORKER_SCOPES
from tests.service.harness import Json


def events_of(text: str) -> list[Any]:
    """The data of every server-sent event; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


class Connection:
    """One request over ASGI; the test decides when to read and when to hang up."""

    def __init__(
        self, app: FastAPI, key: str, path: str, body: Json | None, *, room: int = 0, method: str = "POST"
    ) -> None:
        """`room`: so many messages may wait to be read before the service has to wait; 0 = any number."""
        self.sent: asyncio.Queue[Json] = asyncio.Queue(room)
        self._hung_up = asyncio.Event()
        self._body: bytes | None = b"" if body is None else json.dumps(body).encode()
        headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": ("test", 1), "server": ("test", 80), "state": {},
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self.sent.put))  # type: ignore[arg-type]

    async def _receive(self) -> Json:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def event(self) -> Any:
        """The next server-sent event."""
        while not (message := await asyncio.wait_for(self.sent.get(), 10)).get("body"):
            assert message["type"] in ("http.response.start", "http.response.body")
        return events_of(message["body"].decode())[0]

    async def hang_up(self) -> None:
        self._hung_up.set()
        await asyncio.wait_for(self.task, 10)


@asynccontextmanager
async def running(context: Context, *, worker: bool = False) -> AsyncIterator[tuple[FastAPI, str]]:
    app = create_app(context)
    with context.database.write() as s:
        scopes, tenant = (WORKER_SCOPES, None) if worker else (CLIENT_SCOPES, "carol")
        key = context.keys.create(s, tenant=tenant, name="test", scopes=scopes)
    async with app.router.lifespan_context(app):
        yield app, key
