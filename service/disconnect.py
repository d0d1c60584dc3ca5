"""Work for a client stops when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from fastapi import Request

from service.errors import PerennialError

T = TypeVar("T")


class ClientGone(PerennialError):
    """Nobody is left to read this answer. The status is for our own logs (nginx's 499)."""

    status, code = 499, "client_gone"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled, and ClientGone raised, when the client hangs up first.

    The request's body must have been read: what the client sends next can only be its going.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client has gone.")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each  # what it holds is let go before we go on


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
