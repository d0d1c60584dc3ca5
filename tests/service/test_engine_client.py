"""What engines are asked, read at the port."""

from __future__ import annotations

import json

import httpx2
import pytest

from service.engine_client import EngineClient
from service.errors import Unavailable

pytestmark = pytest.mark.anyio
CHOICE = {"index": 0, "text": "a", "finish_reason": "length"}


async def test_a_probe_asks_for_a_log_prob() -> None:
    """What an engine compiles at their first use is compiled before it takes traffic."""
    asked = []

    def engine(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return httpx2.Response(200, json={"choices": [CHOICE]})

    async with EngineClient("http://engine", transport=httpx2.MockTransport(engine)) as client:
        await client.probe("base")
    assert [(body["max_tokens"], body["logprobs"]) for body in asked] == [(1, 0)]


async def test_a_generating_request_says_what_other_requests_say() -> None:
    """It goes past httpx2's client: key, path under a prefix, type and time-outs go along all the same."""
    seen: list[httpx2.Request] = []

    def engine(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={"choices": [CHOICE]})

    client = EngineClient("http://engine/under/", api_key="secret", timeout=7.0, transport=httpx2.MockTransport(engine))
    async with client:
        await client.generate("/v1/completions", {"prompt": "Zürich 🌧", "seed": 2**70})
        await client.probe("base")
    ours, other = seen
    assert ours.url == other.url == "http://engine/under/v1/completions"
    for name in ("authorization", "accept-encoding", "content-type", "host"):
        assert ours.headers[name] == other.headers[name]
    assert json.loads(ours.content) == {"prompt": "Zürich 🌧", "seed": 2**70}
    assert ours.extensions["timeout"] == {"connect": 5.0, "read": 7.0, "write": 7.0, "pool": 7.0}


async def test_a_generating_request_that_finds_nobody_is_unavailable() -> None:
    def engine(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("nobody", request=request)

    async with EngineClient("http://engine", transport=httpx2.MockTransport(engine)) as client:
        with pytest.raises(Unavailable):
            await client.generate("/v1/completions", {})
        with pytest.raises(Unavailable):
            async with client.stream("/v1/completions", {}):
                pass
