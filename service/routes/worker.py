"""The worker's side: a lease is taken, kept, and ends in exactly one of commit, result, fail and release."""

from __future__ import annotations

import time
from typing import Annotated

import anyio
from fastapi import Path, Request, Response

import api_schemas.worker as wire
from api_schemas.jobs import JobError
from api_schemas.preview import ResultRequest
from api_schemas.training import LoraSettings
from service import admission
from service.auth import Ctx, WorkerKey, guarded
from service.bell import Bell
from service.context import Context
from service.db.tables import Version
from service.errors import LeaseLost, VersionRejected
from service.store import leases

router = guarded(prefix="/worker/v1", tags=["worker"])
RunId = Annotated[str, Path(pattern=r"^run_[0-9a-f]{1,64}$")]
POLL_SECONDS = 2.0
"""How often a waiting lease request looks again unasked: expired leases ring no bell."""


@router.post("/leases", response_model=wire.Lease, responses={204: {"description": "No work."}})
async def lease(request: wire.LeaseRequest, http: Request, context: Ctx, _key: WorkerKey) -> wire.Lease | Response:
    """The next training batch, or 204 after `wait_seconds`."""
    until = time.monotonic() + request.wait_seconds
    while True:
        ticket = context.work.ticket()
        # A lease for nobody would hold the adapter until it expires.
        if context.stopping.is_set() or await http.is_disconnected():
            return Response(status_code=204)
        if (found := await anyio.to_thread.run_sync(_claim, context, request)) is not None:
            return found
        left = until - time.monotonic()
        if left <= 0:
            return Response(status_code=204)
        await Bell.wait(ticket, min(left, POLL_SECONDS))


def _claim(context: Context, request: wire.LeaseRequest) -> wire.Lease | None:
    with context.database.write() as s:
        return leases.claim(s, request, context.settings.rules)


@router.post("/runs/{run_id}/heartbeat")
def heartbeat(run_id: RunId, request: wire.Heartbeat, context: Ctx, _key: WorkerKey) -> wire.HeartbeatReply:
    with context.database.write() as s:
        leases.heartbeat(s, run_id, request, context.settings.lease_seconds)
    return wire.HeartbeatReply(lease_seconds=context.settings.lease_seconds)


@router.post("/runs/{run_id}/commit")
def commit(run_id: RunId, request: wire.CommitRequest, context: Ctx, _key: WorkerKey) -> wire.CommitReply:
    """Admit the version's files, then apply the whole run in one transaction."""
    with context.database.read() as s:
        try:
            _, adapter = leases.held(s, run_id, request.token)
        except LeaseLost:  # asked first: of two commits at once the other may have gone through just now
            if (known := leases.committed(s, run_id)) is None:
                raise
            return wire.CommitReply(version=known.n, digest=known.digest)
        lora, base = LoraSettings.model_validate(adapter.lora), adapter.base_model
    try:
        _admit(context, f"{adapter.id}/{run_id}", request, lora, base)
    except VersionRejected as error:
        failure = JobError(code=error.code, message=error.message)
        with context.database.write() as s:
            final = wire.FailRequest(token=request.token, error=failure, retryable=False)
            leases.fail(s, run_id, final, context.settings.rules)
        raise
    version = _commit(context, run_id, request)
    context.publisher.bell.ring()
    context.work.ring()
    return wire.CommitReply(version=version.n, digest=version.digest)


def _admit(context: Context, uri: str, request: wire.CommitRequest, lora: LoraSettings, base: str) -> None:
    """Raises VersionRejected. Nothing is served that these checks have not seen."""
    if request.uri != uri:
        raise VersionRejected(f"wrong_uri: a version of this run belongs at {uri}.")
    directory = context.settings.adapters_root / uri
    admission.check_files(directory, request.files)
    admission.check_adapter(directory / "adapter", context.base_shapes, base, lora)


def _commit(context: Context, run_id: str, request: wire.CommitRequest) -> Version:
    size = sum(f.size for f in request.files if f.name.startswith("adapter/"))
    with context.database.write() as s:
        return leases.commit(s, run_id, request, digest=admission.version_digest(request.files), size_bytes=size)


@router.post("/runs/{run_id}/result", status_code=204)
def result(run_id: RunId, request: ResultRequest, context: Ctx, _key: WorkerKey) -> None:
    """The end of a preview."""
    with context.database.write() as s:
        leases.answer(s, run_id, request)
    context.work.ring()


@router.post("/runs/{run_id}/fail", status_code=204)
def fail(run_id: RunId, request: wire.FailRequest, context: Ctx, _key: WorkerKey) -> None:
    with context.database.write() as s:
        leases.fail(s, run_id, request, context.settings.rules)
    context.work.ring()


@router.post("/runs/{run_id}/release", status_code=204)
def release(run_id: RunId, request: wire.ReleaseRequest, context: Ctx, _key: WorkerKey) -> None:
    with context.database.write() as s:
        leases.release(s, run_id, request.token)
    context.work.ring()
