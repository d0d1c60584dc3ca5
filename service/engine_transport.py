"""How bytes go to an engine and come back: aiohttp under httpx2's interface, the port at which tests put a fake engine.

The gateway's path to the engine is the hottest there is. Measured against `benchmarks/sse_engine.py`, httpx2's own
transport takes 0.7 ms of computing per request and 65 us per piece of a stream, aiohttp 0.1 ms and 25 us.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx2
from yarl import URL

IDLE_SECONDS = 3.0
"""How long an unused connection is kept. Less than the 5 s after which vLLM's server closes it: a request that is sent
while the other side hangs up is lost."""
CONNECTIONS = 512
OURS_TO_SAY = frozenset({b"host", b"connection", b"content-length", b"transfer-encoding"})
"""Headers that aiohttp writes itself."""


class EngineTransport(httpx2.AsyncBaseTransport):
    """One pool of connections. It never follows a redirect, keeps no cookie, and repeats no request by itself."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def _opened(self) -> aiohttp.ClientSession:
        """Made at the first request: a session belongs to the event loop that runs then."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=IDLE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
            )
        return self._session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        with _mapped(request):
            response = await self._opened().request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=[(k.decode(), v.decode()) for k, v in request.headers.raw if k.lower() not in OURS_TO_SAY],
                data=body or None,
                allow_redirects=False,
                timeout=_timeout(request),
            )
        return httpx2.Response(response.status, headers=response.raw_headers, stream=_Body(request, response))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Body(httpx2.AsyncByteStream):
    def __init__(self, request: httpx2.Request, response: aiohttp.ClientResponse) -> None:
        self._request, self._response = request, response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _mapped(self._request):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        """A body that was not read to its end takes its connection with it: the engine sees that nobody listens."""
        self._response.close()


def _timeout(request: httpx2.Request) -> aiohttp.ClientTimeout:
    said = request.extensions.get("timeout", {})
    return aiohttp.ClientTimeout(
        total=None, connect=said.get("pool"), sock_connect=said.get("connect"), sock_read=said.get("read")
    )


@contextmanager
def _mapped(request: httpx2.Request) -> Iterator[None]:
    """aiohttp's errors as httpx2's. ConnectError and ConnectTimeout: the engine has had nothing of the request."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx2.ConnectTimeout(str(error), request=request) from error
    except TimeoutError as error:
        raise httpx2.ReadTimeout(str(error), request=request) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx2.ConnectError(str(error), request=request) from error
    except aiohttp.InvalidURL as error:
        raise httpx2.UnsupportedProtocol(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:
        raise httpx2.ReadError(str(error), request=request) from error
