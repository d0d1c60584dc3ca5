"""A TCP proxy in front of PostgreSQL: it delays what passes, or cuts a connection at a chosen word."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.from_thread import BlockingPortal


class Wire:
    """Forwards to PostgreSQL's Unix socket, from a port of the loopback interface."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = str(upstream)
        self.port = 0
        self.delay = 0.0
        """Seconds that each piece takes, in either direction: half of a round trip."""
        self.cut_after: bytes | None = None
        """The next piece for the server that holds these bytes is passed on. When the server has answered, all is over,
        and the answer is lost."""

    async def serve(self, started: Callable[[Callable[[], object]], None]) -> None:
        """`started` gets what ends it, to be called from any thread. Returns when every connection is closed."""
        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            BlockingPortal() as portal,
            anyio.create_task_group() as serving,
        ):
            self.port = listener.extra(SocketAttribute.local_port)  # noqa: S610 - not Django's
            serving.start_soon(listener.serve, self._connected)
            started(lambda: portal.call(serving.cancel_scope.cancel))
            await anyio.sleep_forever()

    async def _connected(self, client: ByteStream) -> None:
        """One connection, until either side has ended it."""
        async with client:
            with suppress(OSError):  # PostgreSQL is not there
                async with await anyio.connect_unix(self._upstream) as server, anyio.create_task_group() as ways:
                    cut = anyio.Event()
                    ways.start_soon(self._asks, client, server, cut, ways.cancel_scope)
                    ways.start_soon(self._answers, server, client, cut, ways.cancel_scope)

    async def _asks(self, client: ByteStream, server: ByteStream, cut: anyio.Event, both: anyio.CancelScope) -> None:
        """One way, to its end, which is the other's as well."""
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                piece = await self._piece(client)
                if self.cut_after is not None and self.cut_after in piece:
                    self.cut_after = None
                    cut.set()
                await server.send(piece)
        both.cancel()

    async def _answers(self, server: ByteStream, client: ByteStream, cut: anyio.Event, both: anyio.CancelScope) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                piece = await self._piece(server)
                if cut.is_set():
                    break
                await client.send(piece)
        both.cancel()

    async def _piece(self, source: ByteStream) -> bytes:
        piece = await source.receive()
        if self.delay:
            await anyio.sleep(self.delay)
        return piece


@contextmanager
def wired(upstream: Path) -> Iterator[Wire]:
    """The proxy runs on a thread of its own while the block does."""
    wire, ends = Wire(upstream), queue.Queue[Callable[[], object]]()
    thread = threading.Thread(target=lambda: anyio.run(wire.serve, ends.put))
    thread.start()
    end = ends.get(timeout=60)
    try:
        yield wire
    finally:
        end()
        thread.join(60)
