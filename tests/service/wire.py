"""A TCP proxy in front of PostgreSQL: it delays what passes, or cuts a connection at a chosen word."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Wire:
    """Forwards to PostgreSQL's Unix socket, from a port of the loopback interface."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = str(upstream)
        self.port = 0
        self.delay = 0.0
        """Seconds that each piece takes, in either direction: half of a round trip."""
        self.cut_after: bytes | None = None
        """The next piece for the server that holds these bytes is passed on; its answer is not, and all is over."""

    async def serve(self, started: Callable[[Callable[[], object]], None]) -> None:
        """`started` gets what ends it, to be called from any thread."""
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            started(lambda: loop.call_soon_threadsafe(over.set))
            await over.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side has ended it."""
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            writer.close()
            return
        ways = [
            asyncio.create_task(self._to_server(reader, up_writer)),
            asyncio.create_task(self._pump(up_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the proxy ends; Python 3.11's streams would report this as a failure of ours
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            up_writer.close()
            writer.close()

    async def _to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            cut = self.cut_after is not None and self.cut_after in piece
            await self._pass(piece, writer)
            if cut:
                self.cut_after = None
                return

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            await self._pass(piece, writer)

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        writer.write(piece)
        await writer.drain()


@contextmanager
def wired(upstream: Path) -> Iterator[Wire]:
    """The proxy runs on a thread of its own while the block does."""
    wire, ends = Wire(upstream), queue.Queue[Callable[[], object]]()
    thread = threading.Thread(target=lambda: asyncio.run(wire.serve(ends.put)))
    thread.start()
    end = ends.get(timeout=60)
    try:
        yield wire
    finally:
        end()
        thread.join(60)
