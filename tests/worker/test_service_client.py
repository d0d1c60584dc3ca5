"""Which answer becomes which exception: the decisions of the supervisor hang on it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from api_schemas.worker import CommitRequest, FileEntry, Heartbeat, LeaseRequest
from worker.errors import (
    LeaseLostError,
    RefusedError,
    ServiceUnavailableError,
    UnauthorisedError,
    VersionRejectedError,
)
from worker.service_client import ServiceClient, http_client

COMMIT = CommitRequest(
    token=1,
    uri="adp/run",
    files=[FileEntry(name=f"adapter/{n}", size=1, sha256="0" * 64) for n in "ab"],
    standing_feedback=[],
    metrics=[],
    training_seconds=0.5,
)


def ask(answer: Any, what: str = "commit") -> Any:
    """One call against a service that gives `answer`: a (status, body) pair, or an exception of the transport."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return httpx2.Response(status, json=body) if isinstance(body, dict) else httpx2.Response(status, content=body)

    async def call() -> Any:
        transport = httpx2.MockTransport(handle)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as http:
            client = ServiceClient(http)
            if what == "lease":
                return await client.lease(LeaseRequest(worker_id="w", base_model="b"))
            if what == "heartbeat":
                return await client.heartbeat("run", Heartbeat(token=1))
            return await client.commit("run", COMMIT)

    return asyncio.run(call())


def error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "why", "type": "some_error", "param": None}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((409, error("lease_lost")), LeaseLostError),
        ((422, error("version_rejected")), VersionRejectedError),
        ((401, error("invalid_api_key")), UnauthorisedError),
        ((403, error("missing_scope")), UnauthorisedError),
        ((503, error("unavailable")), ServiceUnavailableError),
        ((500, b"<html>a proxy's page</html>"), ServiceUnavailableError),
        ((429, error("over_quota")), ServiceUnavailableError),
        ((200, b"cut off"), ServiceUnavailableError),
        ((409, error("conflict")), RefusedError),
        ((422, error("invalid_request")), RefusedError),
        ((404, error("run_not_found")), RefusedError),
        ((307, b""), RefusedError),
        (httpx2.ConnectError("refused"), ServiceUnavailableError),
        (httpx2.ReadTimeout("slow"), ServiceUnavailableError),
        (httpx2.RemoteProtocolError("closed without an answer"), ServiceUnavailableError),
    ],
)
def test_answers_become_exceptions(answer: Any, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        ask(answer)


def test_no_work_is_none() -> None:
    assert ask((204, b""), "lease") is None


def test_unknown_fields_of_a_newer_service_are_dropped() -> None:
    answer = ask((200, {"lease_seconds": 9.0, "cancelled": True, "news": 1}), "heartbeat")
    assert (answer.lease_seconds, answer.cancelled) == (9.0, True)


def test_the_token_goes_into_every_request_and_into_no_message() -> None:
    async def headers() -> Any:
        async with http_client("http://service", "secret-token") as http:
            return http.headers["authorization"]

    assert asyncio.run(headers()) == "Bearer secret-token"
