"""The worker's side: a lease is taken, kept, and ends in exactly one of commit, result, fail and release."""

from __future__ import annotations

import time
from typing import Annotated

import anyio
from fastapi import Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

import api_schemas.worker as wire
from api_schemas.jobs import JobError
from api_schemas.preview import ResultRequest
from api_schemas.training import LoraSettings
from service import admission
from service.auth import Ctx, WorkerKey, guarded
from service.bell import Bell
from service.context import Context
from service.db.tables import Version
from service.errors import BadRequest, Conflict, LeaseLost, NotFound, VersionRejected
from service.routes.raw import RAW_BODY
from service.store import leases, versions
from service.uploads import landed

router = guarded(prefix="/worker/v1", tags=["worker"])
RunId = Annotated[str, Path(pattern=r"^run_[0-9a-f]{1,64}$")]
Sum = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[int, Query()]
"""The lease's fencing token."""
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


@router.put("/runs/{run_id}/files/{sha256}", openapi_extra=RAW_BODY)
async def send_file(
    run_id: RunId, sha256: Sum, token: Token, request: Request, context: Ctx, _key: WorkerKey
) -> wire.FileReceived:
    """One file of the version that this run will commit, as the raw body; where they share no directory. Idempotent."""
    adapter_id = await anyio.to_thread.run_sync(_writes, context, run_id, token)
    directory = context.settings.adapters_root / "incoming"
    try:
        async with landed(request.stream(), directory, sha256) as path:
            await anyio.to_thread.run_sync(context.storage.receive, f"{adapter_id}/{run_id}", sha256, path)
            size = path.stat().st_size
    except ClientDisconnect as error:
        raise BadRequest("The file broke off; send it again.", code="upload_incomplete") from error
    return wire.FileReceived(sha256=sha256, size=size)


def _writes(context: Context, run_id: str, token: int) -> str:
    """The adapter that this run may write for."""
    if not context.storage.remote:
        raise Conflict("Workers write into the shared directory themselves.", code="files_are_shared")
    with context.database.read() as s:
        return leases.held(s, run_id, token)[1].id


@router.get("/runs/{run_id}/parent/{sha256}", response_class=FileResponse)
def fetch_file(run_id: RunId, sha256: Sum, token: Token, context: Ctx, _key: WorkerKey) -> FileResponse:
    """One file of the version that this run starts from."""
    with context.database.read() as s:
        run, adapter = leases.held(s, run_id, token)
        parent = s.get(Version, (adapter.id, run.parent_n))
        if parent is None:
            raise NotFound("This run starts from the base model.", code="file_not_found")
        files = [wire.FileEntry.model_validate(f) for f in versions.with_files(parent).files]
        uri = parent.uri
    names = [f.name for f in files if f.sha256 == sha256]
    if not names:
        raise NotFound("The parent has no such file.", code="file_not_found", param="sha256")
    return FileResponse(context.storage.directory(uri, files) / names[0], media_type="application/octet-stream")


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
    directory = context.storage.directory(uri, request.files)
    admission.check_adapter(directory / "adapter", context.base_shapes, base, lora)
    context.storage.seal(uri, request.files)


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
