"""What lies around every request."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.middleware import RequestIds

CLOSED = "unable to perform operation on <TCPTransport closed=True reading=False 0x1>; the handler is closed"


@pytest.mark.parametrize(("fault", "kept_from_us"), [(CLOSED, True), ("Response content shorter than said", False)])
def test_a_connection_that_was_reset_a_moment_ago_takes_what_is_sent(fault: str, kept_from_us: bool) -> None:
    """As uvicorn does once it knows; other faults of sending are ours."""
    told: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        told.append("went on")

    async def send(_message: Message) -> None:
        raise RuntimeError(fault)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    try:
        asyncio.run(RequestIds(app)({"type": "http"}, receive, send))
    except RuntimeError as error:
        told.append(str(error))
    assert told == (["went on"] if kept_from_us else [fault])
