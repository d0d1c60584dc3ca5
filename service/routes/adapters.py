"""Adapters, their versions, download and promotion."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import Header, Path, Query
from fastapi.responses import FileResponse, Response

import api_schemas.adapters as wire
from api_schemas.base import AdapterName
from api_schemas.jobs import Page
from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry
from service import admission, archive, room
from service.auth import AdaptersReader, AdaptersWriter, Ctx, guarded
from service.context import Context
from service.downloads import Download
from service.errors import Conflict, Unprocessable
from service.routes.ids import QueryId
from service.store import adapters, feedback, rebuild, retries, versions

router = guarded(tags=["adapters"])
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]


@router.post("/v1/adapters", status_code=201)
def create_adapter(request: wire.AdapterCreate, context: Ctx, tenant: AdaptersWriter) -> wire.Adapter:
    """A new adapter; until it has learnt something the base model answers for it."""
    check_creation(context, request)
    room.check(context.settings)
    with context.database.write() as s:
        row = adapters.create(s, tenant, request, context.base_model, limit=context.settings.max_adapters)
        return adapters.view(row)


def check_creation(context: Context, request: wire.AdapterCreate) -> None:
    """Raises Unprocessable or Conflict for what could never be trained or served."""
    if request.base_model not in (None, context.base_model):
        raise Unprocessable(
            f"This service serves the base model '{context.base_model}' alone.",
            code="unknown_base_model",
            param="base_model",
        )
    if request.name == context.base_model:
        raise Conflict("This is the base model's own name.", code="adapter_exists", param="name")
    if request.lora.rank > context.settings.max_lora_rank:
        raise Unprocessable(
            f"The engine serves ranks up to {context.settings.max_lora_rank}.",
            code="rank_too_high",
            param="lora.rank",
        )
    found = {m.rsplit(".", 1)[-1] for m in context.base_shapes}
    if absent := sorted(set(request.lora.target_modules) - found):
        raise Unprocessable(
            f"The base model has no module '{absent[0]}'.", code="unknown_module", param="lora.target_modules"
        )
    feedback.resolved_training(request.training)


@router.get("/v1/adapters")
def list_adapters(
    context: Ctx, tenant: AdaptersReader, after: QueryId = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Page[wire.Adapter]:
    """Oldest first."""
    with context.database.read() as s:
        rows, more = adapters.listing(s, tenant, after, limit)
        return Page[wire.Adapter](data=[adapters.view(a) for a in rows], has_more=more)


@router.get("/v1/adapters/{adapter}")
def get_adapter(adapter: AdapterName, context: Ctx, tenant: AdaptersReader) -> wire.Adapter:
    with context.database.read() as s:
        return adapters.view(adapters.by_name(s, tenant, adapter))


@router.patch("/v1/adapters/{adapter}")
def change_adapter(
    adapter: AdapterName, request: wire.AdapterChange, context: Ctx, tenant: AdaptersWriter
) -> wire.Adapter:
    """What may be changed of an adapter; its shape and its name may not."""
    with context.database.write() as s:
        row = adapters.locked(s, adapters.by_name(s, tenant, adapter).id)
        row.on_failure = request.on_failure
        return adapters.view(row)


@router.delete("/v1/adapters/{adapter}")
def delete_adapter(adapter: AdapterName, context: Ctx, tenant: AdaptersWriter) -> wire.AdapterDeleted:
    """Open jobs are cancelled, the name is free again, the files go once the engine has let go of them."""
    with context.database.write() as s:
        row = adapters.by_name(s, tenant, adapter)
        adapters.delete(s, row)
    context.publisher.bell.ring()
    return wire.AdapterDeleted(id=row.id, name=row.name)


@router.get("/v1/adapters/{adapter}/versions")
def list_versions(
    adapter: AdapterName,
    context: Ctx,
    tenant: AdaptersReader,
    after: Annotated[int | None, Query(ge=0, lt=2**31)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[wire.Version]:
    """Oldest first."""
    with context.database.read() as s:
        row = adapters.by_name(s, tenant, adapter)
        found, more = versions.listing(s, row, after, limit)
        return Page[wire.Version](data=[versions.view(s, row, v) for v in found], has_more=more)


@router.get("/v1/adapters/{adapter}/versions/{version}")
def get_version(adapter: AdapterName, version: VersionNumber, context: Ctx, tenant: AdaptersReader) -> wire.Version:
    with context.database.read() as s:
        row = adapters.by_name(s, tenant, adapter)
        return versions.view(s, row, versions.get(s, row, version))


@router.get("/v1/adapters/{adapter}/versions/{version}/download", response_class=FileResponse)
def download_version(
    adapter: AdapterName,
    version: VersionNumber,
    context: Ctx,
    tenant: AdaptersReader,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A zip of the PEFT directory: `PeftModel.from_pretrained` and vLLM load it as it is."""
    with context.database.read() as s:
        row = adapters.by_name(s, tenant, adapter)
        found = versions.with_files(versions.get(s, row, version))
    etag = f'"{found.digest}"'
    headers = {"etag": etag, "cache-control": "private, immutable, max-age=31536000"}
    if if_none_match is not None and etag in (tag.strip().removeprefix("W/") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    path = archive.path_of(context.settings.archives_root, found.digest)
    if not path.exists():
        files = [FileEntry.model_validate(f) for f in found.files]
        archive.build(context.storage.directory(found.uri, files), files, path)
    return Download(path, filename=f"{adapter}-v{version}.zip", media_type="application/zip", headers=headers)


@router.post("/v1/adapters/{adapter}/promote")
async def promote_version(
    adapter: AdapterName, request: wire.Promote, context: Ctx, tenant: AdaptersWriter
) -> wire.Adapter:
    """Serve this version and train the next one from it: also the rollback. Loaded first, then all moves at once."""
    adapter_id = await anyio.to_thread.run_sync(_check_promotion, context, tenant, adapter, request.version)
    if request.version == 0:
        return await anyio.to_thread.run_sync(_promote, context, tenant, adapter, adapter_id, 0)
    async with context.serving.hold(adapter_id, request.version, generates=False):
        return await anyio.to_thread.run_sync(_promote, context, tenant, adapter, adapter_id, request.version)


def _check_promotion(context: Context, tenant: str, name: str, n: int) -> str:
    with context.database.read() as s:
        row = adapters.by_name(s, tenant, name)
        rebuild.check_none_runs(s, row)
        version = versions.promotable(s, row, n) if n else None
    if version is not None:
        lora = LoraSettings.model_validate(row.lora)
        directory = context.storage.directory(version.uri, [FileEntry.model_validate(f) for f in version.files])
        admission.check_adapter(directory / "adapter", context.base_shapes, row.base_model, lora)
    return row.id


def _promote(context: Context, tenant: str, name: str, adapter_id: str, n: int) -> wire.Adapter:
    with context.database.write() as s:
        row = adapters.by_name(s, tenant, name)
        if row.id != adapter_id:
            raise Conflict("The adapter was replaced meanwhile.", code="adapter_replaced")
        row = adapters.locked(s, row.id)
        rebuild.check_none_runs(s, row)
        if n:
            versions.promotable(s, row, n)  # it may have been rejected, or lost its files, meanwhile
        adapters.promote(s, row, n)
        view = adapters.view(row)
    context.work.ring()
    context.publisher.bell.ring()
    return view


@router.post("/v1/adapters/{adapter}/pause")
def pause_adapter(adapter: AdapterName, context: Ctx, tenant: AdaptersWriter) -> wire.Adapter:
    """Queued work waits, and a job that runs is finished. Chats and feedback go on."""
    with context.database.write() as s:
        row = adapters.by_name(s, tenant, adapter)
        retries.stop(s, row)
        return adapters.view(row)


@router.post("/v1/adapters/{adapter}/resume")
def resume_adapter(adapter: AdapterName, context: Ctx, tenant: AdaptersWriter) -> wire.Adapter:
    """Queued work goes on, also past a failed job that blocked it."""
    with context.database.write() as s:
        row = adapters.by_name(s, tenant, adapter)
        retries.resume(s, row)
        view = adapters.view(row)
    context.work.ring()
    return view
