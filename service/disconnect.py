"""Work for a client stops when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from service.errors import PerennialError

T = TypeVar("T")


class ClientGone(PerennialError):
    """Nobody is left to read this answer. The status is for our own logs (nginx's 499)."""

    status, code = 499, "client_gone"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled, and ClientGone raised, when the client hangs up first.

    The request's body must have been read: what the client sends next can only be its going.
    """
    if (worker := asyncio.current_task()) is None:
        raise RuntimeError("no task that could be cancelled")
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        worker.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or worker.uncancel():  # somebody else wants us to end
            raise
        raise ClientGone("The client has gone.") from None
    finally:
        watcher.cancel()  # it holds nothing, so nobody waits for its end
