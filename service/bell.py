"""A hint that something changed, rung from any thread. Never truth: who hears it looks at the database."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Bell:
    """Take a ticket, look at the database, then wait on the ticket: no ring between the two is missed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def ticket(self) -> asyncio.Event:
        self._loop = asyncio.get_running_loop()
        return self._event

    def ring(self) -> None:
        """From any thread; wakes every ticket taken so far."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        rung, self._event = self._event, asyncio.Event()
        rung.set()

    @staticmethod
    async def wait(ticket: asyncio.Event, timeout: float) -> None:
        """Until rung or `timeout` seconds have gone."""
        # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with the ring.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await ticket.wait()
