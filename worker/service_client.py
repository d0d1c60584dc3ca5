"""The worker API over HTTP: typed calls in, typed answers or one of five exceptions out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from api_schemas.errors import ErrorResponse
from api_schemas.preview import ResultRequest
from api_schemas.worker import (
    CommitReply,
    CommitRequest,
    FailRequest,
    FileEntry,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseRequest,
    ReleaseRequest,
)
from worker.errors import (
    LeaseLostError,
    RefusedError,
    ServiceUnavailableError,
    UnauthorisedError,
    VersionRejectedError,
)

R = TypeVar("R", bound=BaseModel)
TIMEOUT_SECONDS = 5.0
COMMIT_TIMEOUT_SECONDS = 120.0
"""The service hashes and checks every file of a version before it answers."""
CHUNK = 2**20


def http_client(service_url: str, token: str) -> httpx2.AsyncClient:
    """A client for one service. Proxies of the environment are not used: the token goes to the service alone."""
    return httpx2.AsyncClient(
        base_url=service_url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_SECONDS, trust_env=False
    )


class ServiceClient:
    """One worker's view of the service.

    Every call raises ServiceUnavailableError (worth retrying), UnauthorisedError or RefusedError; the calls on a run
    also raise LeaseLostError.
    """

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def lease(self, request: LeaseRequest) -> Lease | None:
        """The next run for this worker; None when there is no work."""
        response = await self._post("leases", request, timeout=TIMEOUT_SECONDS + request.wait_seconds)
        return None if response.status_code == 204 else _parsed(response, Lease)

    async def heartbeat(self, run_id: str, request: Heartbeat) -> HeartbeatReply:
        return _parsed(await self._post(f"runs/{run_id}/heartbeat", request), HeartbeatReply)

    async def commit(self, run_id: str, request: CommitRequest) -> CommitReply:
        """Idempotent by run: after a lost acknowledgement the same reply again. Raises VersionRejectedError."""
        response = await self._post(f"runs/{run_id}/commit", request, timeout=COMMIT_TIMEOUT_SECONDS)
        return _parsed(response, CommitReply)

    async def send_file(self, lease: Lease, entry: FileEntry, path: Path, alive: Callable[[], None]) -> None:
        """One file of the version that will be committed. Idempotent. Raises OSError too."""

        async def chunks() -> AsyncIterator[bytes]:
            with path.open("rb") as file:
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    yield chunk
                    alive()

        try:
            response = await self._http.put(
                f"/worker/v1/runs/{lease.run_id}/files/{entry.sha256}",
                params={"token": lease.token},
                content=chunks(),
                headers={"Content-Length": str(entry.size), "Content-Type": "application/octet-stream"},
                timeout=COMMIT_TIMEOUT_SECONDS,
            )
        except httpx2.RequestError as error:
            raise ServiceUnavailableError(f"{type(error).__name__} at files") from error
        if not response.is_success:
            raise _error_of(response)

    async def fetch_file(self, lease: Lease, entry: FileEntry, path: Path, alive: Callable[[], None]) -> None:
        """One file of the run's parent, checked. Raises OSError too."""
        digest = hashlib.sha256()
        try:
            async with self._http.stream(
                "GET",
                f"/worker/v1/runs/{lease.run_id}/parent/{entry.sha256}",
                params={"token": lease.token},
                timeout=COMMIT_TIMEOUT_SECONDS,
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise _error_of(response)
                with path.open("wb") as file:
                    async for chunk in response.aiter_bytes(CHUNK):
                        digest.update(chunk)
                        await asyncio.to_thread(file.write, chunk)
                        alive()
        except httpx2.RequestError as error:
            raise ServiceUnavailableError(f"{type(error).__name__} at parent") from error
        if digest.hexdigest() != entry.sha256:
            raise ServiceUnavailableError(f"{entry.name} of the parent came with other bytes")

    async def result(self, run_id: str, request: ResultRequest) -> None:
        """Of a preview. Idempotent by run."""
        await self._post(f"runs/{run_id}/result", request)

    async def fail(self, run_id: str, request: FailRequest) -> None:
        await self._post(f"runs/{run_id}/fail", request)

    async def release(self, run_id: str, token: int) -> None:
        await self._post(f"runs/{run_id}/release", ReleaseRequest(token=token))

    async def _post(self, path: str, body: BaseModel, timeout: float = TIMEOUT_SECONDS) -> httpx2.Response:
        try:
            response = await self._http.post(
                f"/worker/v1/{path}",
                content=body.model_dump_json(),
                headers={"Content-Type": "application/json"},
                timeout=timeout,
            )
        except httpx2.RequestError as error:
            raise ServiceUnavailableError(f"{type(error).__name__} at {path}") from error
        if not response.is_success:
            raise _error_of(response)
        return response


def _parsed(response: httpx2.Response, model: type[R]) -> R:
    """The body as `model`. A body that is none (a proxy's page, a cut answer) is worth a retry, not a crash."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) or "body" for e in error.errors(include_input=False))
        raise ServiceUnavailableError(f"the service answered with an unreadable {model.__name__}: {fields}") from error


def _error_of(response: httpx2.Response) -> Exception:
    status = response.status_code
    try:
        detail = ErrorResponse.model_validate_json(response.content).error
        code, message = detail.code, detail.message
    except ValidationError:
        code, message = "unknown", "the answer carried no error body"
    if status in (401, 403):
        return UnauthorisedError(message)
    if status in (408, 429) or status >= 500:
        return ServiceUnavailableError(f"{status} {code}")
    if (status, code) == (409, "lease_lost"):
        return LeaseLostError(message)
    if (status, code) == (422, "version_rejected"):
        return VersionRejectedError(message)
    return RefusedError(status, code, message)
