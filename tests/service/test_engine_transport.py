"""The way to the engine over real sockets: connections are used again, errors are httpx2's, who leaves is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest

from service.engine_transport import EngineTransport

pytestmark = pytest.mark.anyio
Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Speaks raw HTTP; `heads` has every request's head, by connection."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self.heads: list[list[bytes]] = []
        self.gone = asyncio.Event()
        """A client hung up."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[bytes] = []
        self.heads.append(mine)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                mine.append(head)
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]) if b"ength:" in head else 0
                await reader.readexactly(size)
                await self._talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


@asynccontextmanager
async def against(talk: Conversation) -> AsyncIterator[tuple[httpx2.AsyncClient, Server]]:
    server = Server(talk)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    headers = {"authorization": "Bearer secret", "accept-encoding": "identity"}
    timeout = httpx2.Timeout(5.0, read=0.3)
    async with (
        listening,
        httpx2.AsyncClient(base_url=url, transport=EngineTransport(), headers=headers, timeout=timeout) as client,
    ):
        yield client, server


async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-kind: plain\r\ncontent-length: 2\r\n\r\n{}")


async def stream(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + b"3\r\none\r\n")
    await writer.drain()
    writer.write(b"3\r\ntwo\r\n0\r\n\r\n")


async def test_requests_go_out_as_they_are_and_share_a_connection() -> None:
    async with against(plain) as (client, server):
        for _ in range(3):
            answer = await client.post("/v1/chat?x=%2F", json={"a": 1})
            assert (answer.status_code, answer.headers["x-kind"], answer.json()) == (200, "plain", {})
    assert len(server.heads) == 1
    lines = server.heads[0][0].decode().split("\r\n")
    names = sorted(line.split(":")[0].lower() for line in lines[1:] if line)
    assert lines[0] == "POST /v1/chat?x=%2F HTTP/1.1"
    assert "authorization: Bearer secret" in [f"{k.lower()}:{v}" for k, _, v in (x.partition(":") for x in lines)]
    assert len(set(names)) == len(names), "no header twice"
    assert "cookie" not in names


async def test_a_stream_read_to_its_end_leaves_its_connection_to_the_next() -> None:
    async with against(stream) as (client, server):
        for _ in range(2):
            async with client.stream("POST", "/", json={}) as answer:
                assert b"".join([piece async for piece in answer.aiter_raw()]) == b"onetwo"
    assert len(server.heads) == 1


async def test_a_stream_that_is_left_ends_its_connection() -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        while True:
            writer.write(b"3\r\none\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    async with against(endless) as (client, server):
        async with client.stream("POST", "/", json={}) as answer:
            await anext(answer.aiter_raw())
        await asyncio.wait_for(server.gone.wait(), 5)


async def test_a_request_that_is_cancelled_ends_its_connection() -> None:
    begun = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        begun.set()
        await reader.readexactly(1)

    async with against(silent) as (client, server):
        task = asyncio.create_task(client.post("/", json={}, timeout=30))
        await begun.wait()
        task.cancel()
        await asyncio.wait_for(server.gone.wait(), 5)


async def test_redirects_are_not_followed_and_cookies_not_kept() -> None:
    async def elsewhere(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (
            b"HTTP/1.1 307 Moved\r\nlocation: http://169.254.169.254/\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n"
        )
        writer.write(head)

    async with against(elsewhere) as (client, server):
        assert (await client.post("/", json={})).status_code == 307
        await client.post("/", json={})
    assert len(server.heads[0]) == 2


async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def cut_later(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + b"3\r\none\r\n")
    await writer.drain()
    writer.close()


async def slow(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readexactly(1)


async def slow_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + b"3\r\none\r\n")
    await reader.readexactly(1)


async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@pytest.mark.parametrize(
    ("talk", "error"),
    [
        (cut, httpx2.ReadError),
        (cut_later, httpx2.ReadError),
        (slow, httpx2.ReadTimeout),
        (slow_later, httpx2.ReadTimeout),
        (nonsense, httpx2.ReadError),
    ],
)
async def test_what_goes_wrong_is_httpx2s_error(talk: Conversation, error: type[Exception]) -> None:
    async with against(talk) as (client, _):
        with pytest.raises(error):
            await client.post("/", json={})


async def test_nobody_listens() -> None:
    async with httpx2.AsyncClient(base_url="http://127.0.0.1:9", transport=EngineTransport()) as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get("/")
