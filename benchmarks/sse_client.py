"""A client that costs next to nothing: raw HTTP, events counted by their bytes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Streamed:
    """What one streamed answer took; seconds."""

    first: float
    total: float
    chunks: int


class Streamer:
    """One connection, kept open; one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader, self._writer, self._key = reader, writer, key

    @classmethod
    async def connected(cls, url: str, key: str) -> Self:
        at = urlsplit(url)
        return cls(*await asyncio.open_connection(at.hostname, at.port, limit=2**20), key)

    async def ask(self, body: Any) -> Streamed:
        """Stream one answer to its end. Raises RuntimeError for anything but a whole answer."""
        raw = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self._key}\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        started = time.perf_counter()
        self._writer.write(head.encode() + raw)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise RuntimeError(status.decode() + (await self._reader.read(4096)).decode())
        first, chunks, tail = 0.0, 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            piece = await self._reader.read(2**18)
            if not piece:
                raise RuntimeError("the stream was cut")
            first = first or (time.perf_counter() - started if b"data:" in piece else 0.0)
            chunks += piece.count(b"data: {")
            tail = (tail + piece)[-32:]
        if b"data: [DONE]" not in tail:
            raise RuntimeError("the stream ended without [DONE]")
        return Streamed(first, time.perf_counter() - started, chunks)

    def close(self) -> None:
        self._writer.close()
