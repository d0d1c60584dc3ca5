"""Clients that cost next to nothing: raw HTTP on connections that stay open: the service is what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Sending:
    """One request of one client."""

    key: str
    """Its Idempotency-Key; the same key always goes with the same body."""
    body: bytes
    cut: bool = False
    """Hang up before the answer, then send it again on a new connection: an acknowledgement that was lost."""


@dataclass(frozen=True)
class Answered:
    key: str
    status: int
    seconds: float
    batch_id: str | None
    replayed: bool


class Client:
    """One connection, kept open; one request after the other."""

    def __init__(self, url: str, api_key: str, path: str = "/v1/feedback") -> None:
        self._at = urlsplit(url)
        self._head = (
            f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {api_key}\r\n"
        )

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._at.hostname, self._at.port)

    async def send(self, sending: Sending) -> Answered:
        """The answer; the time is that of the request which was answered."""
        if sending.cut:
            self._write(sending)
            await self._writer.drain()
            self._writer.close()
            await self._connect()
        started = time.perf_counter()
        self._write(sending)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        raw = await self._reader.readexactly(size)
        seconds = time.perf_counter() - started
        body: Any = json.loads(raw)
        return Answered(
            sending.key, int(head.split(b" ", 2)[1]), seconds, body.get("id"), b"idempotent-replayed: true" in head
        )

    def _write(self, sending: Sending) -> None:
        head = f"{self._head}idempotency-key: {sending.key}\r\ncontent-length: {len(sending.body)}\r\n\r\n"
        self._writer.write(head.encode() + sending.body)


async def load(
    url: str, api_key: str, shares: Sequence[Sequence[Sending]], path: str = "/v1/feedback"
) -> tuple[list[Answered], float]:
    """Each share sent by a client of its own, all at once: every answer, and the seconds that it took."""

    async def one(client: Client, share: Sequence[Sending]) -> list[Answered]:
        return [await client.send(sending) for sending in share]

    clients = [await Client(url, api_key, path).__aenter__() for _ in shares]
    try:
        started = time.perf_counter()
        done = await asyncio.gather(*(one(c, s) for c, s in zip(clients, shares, strict=True)))
        return [a for each in done for a in each], time.perf_counter() - started
    finally:
        for client in clients:
            await client.__aexit__()
