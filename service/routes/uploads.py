"""Adapters from elsewhere: two raw PUTs, then a commit that names both by their checksums."""

from __future__ import annotations

from typing import Annotated, Literal

import anyio
from fastapi import Request
from pydantic import Field
from starlette.requests import ClientDisconnect

import api_schemas.adapters as wire
from api_schemas.base import AdapterName
from api_schemas.training import LoraSettings
from service import room, uploads
from service.auth import AdaptersWriter, Ctx, guarded
from service.context import Context
from service.db.tables import Adapter
from service.errors import BadRequest, Conflict, NotFound
from service.routes.raw import RAW_BODY
from service.store import adapters, versions
from service.store import uploads as store
from service.store.ids import new_id

router = guarded(tags=["adapters"])
UploadName = Annotated[Literal["adapter_config.json", "adapter_model.safetensors"], Field()]


@router.put("/v1/adapters/{adapter}/upload/{file}", openapi_extra=RAW_BODY)
async def upload_file(
    adapter: AdapterName, file: UploadName, request: Request, context: Ctx, tenant: AdaptersWriter
) -> wire.UploadedFile:
    """One file of a PEFT directory as the raw body, checked whole; nothing changes before the commit."""
    row = await anyio.to_thread.run_sync(_adapter, context, tenant, adapter)
    room.check(context.settings, int(request.headers.get("content-length", "0")))
    place = context.settings.adapters_root / row.id
    try:
        entry = await uploads.receive(request.stream(), place, file, _wanted(context, row))
        staged = uploads.staging_of(place) / entry.sha256
        await anyio.to_thread.run_sync(context.storage.stage, row.id, entry.sha256, staged)
    except ClientDisconnect as error:
        raise BadRequest("The upload broke off; send it again.", code="upload_incomplete") from error
    return wire.UploadedFile(name=file, size_bytes=entry.size, sha256=entry.sha256)


@router.post("/v1/adapters/{adapter}/upload/commit", status_code=201)
def commit_upload(
    adapter: AdapterName, request: wire.UploadCommit, context: Ctx, tenant: AdaptersWriter
) -> wire.Version:
    """The uploaded weights become the next version and the training head; served once loaded. Safe to repeat."""
    with context.database.read() as s:
        row = adapters.by_name(s, tenant, adapter)
        if (known := store.known(s, row, request.weights_sha256)) is not None:
            return versions.view(s, row, known)
    place, run_id = context.settings.adapters_root / row.id, new_id("run")
    config = uploads.staged(place, uploads.CONFIG, request.config_sha256, context.storage)
    weights = uploads.staged(place, uploads.WEIGHTS, request.weights_sha256, context.storage)
    about = {
        "adapter": row.name, "adapter_id": row.id, "run_id": run_id, "base_model": row.base_model,
        "uploaded": request.model_dump(),
    }  # fmt: skip
    uri = f"{row.id}/{run_id}"
    landing = context.storage.landing(row.id, run_id)
    files = uploads.assemble(landing, config, weights, _wanted(context, row), about)
    try:
        context.storage.publish(uri, files)
        with context.database.write() as s:
            now = adapters.by_name(s, tenant, adapter)
            if now.id != row.id:
                raise Conflict("The adapter was replaced meanwhile.", code="adapter_replaced")
            version = store.commit(s, now, run_id, files)
            if not context.storage.is_sealed(uri):  # asked under the lock that the collection of garbage takes
                raise Conflict("The upload took too long; commit it again.", code="upload_expired")
            view = versions.view(s, now, version)
    except (Conflict, NotFound):  # of other errors one cannot know that nothing was committed
        context.storage.discard(uri)
        raise
    for path in (config, weights):
        path.unlink(missing_ok=True)
        context.storage.unstage(row.id, path.name)
    context.work.ring()
    context.publisher.bell.ring()
    return view


def _adapter(context: Context, tenant: str, name: str) -> Adapter:
    with context.database.read() as s:
        return adapters.by_name(s, tenant, name)


def _wanted(context: Context, row: Adapter) -> uploads.Wanted:
    return uploads.Wanted(row.base_model, context.base_shapes, LoraSettings.model_validate(row.lora))
