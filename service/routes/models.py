"""The list of models, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import anyio.to_thread

from api_schemas.base import ModelName
from service.auth import ChatTenant, Ctx, guarded
from service.context import Context
from service.db.tables import Adapter
from service.store import adapters
from service.targets import resolve_target

router = guarded(tags=["chat"])


@router.get("/v1/models")
def list_models(context: Ctx, tenant: ChatTenant) -> dict[str, Any]:
    """The base model and the caller's adapters, in OpenAI's shape."""
    with context.database.read() as s:
        rows, _ = adapters.listing(s, tenant, None, context.settings.max_adapters)
    return {"object": "list", "data": [_base_model(context), *(_model(a) for a in rows)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: ModelName, context: Ctx, tenant: ChatTenant) -> dict[str, Any]:
    """One model by the name that a chat would use."""
    target = await resolve_target(context, tenant, model)
    if target.adapter is None:
        return _base_model(context)
    return await anyio.to_thread.run_sync(_named, context, tenant, target.adapter) | {"id": model}


def _named(context: Context, tenant: str, name: str) -> dict[str, Any]:
    with context.database.read() as s:
        return _model(adapters.by_name(s, tenant, name))


def _base_model(context: Context) -> dict[str, Any]:
    return {"id": context.base_model, "object": "model", "created": 0, "owned_by": "perennial", "parent": None}


def _model(adapter: Adapter) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": "perennial",
        "parent": adapter.base_model,
        "perennial": {"live_version": adapter.live_n},
    }
