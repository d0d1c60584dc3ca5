"""Is the process up, and is everything there that a user needs?"""

from __future__ import annotations

from typing import Literal

import anyio
from fastapi import APIRouter, Response

from service.auth import Ctx
from service.context import Context
from service.db import migrate
from service.errors import PerennialError
from service.store import jobs

router = APIRouter(tags=["health"])
Part = Literal["ok", "missing"]


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(context: Ctx, response: Response) -> dict[str, object]:
    """Database, engine and worker: 503 names what is missing."""
    database, worker = await anyio.to_thread.run_sync(_database_and_worker, context)
    parts: dict[str, Part] = {"database": database, "engine": await _engine(context), "worker": worker}
    missing = [name for name, state in parts.items() if state != "ok"]
    if missing:
        response.status_code = 503
        response.headers["retry-after"] = "2"
    return {"status": "missing" if missing else "ok", "missing": missing, "parts": parts}


def _database_and_worker(context: Context) -> tuple[Part, Part]:
    try:
        if migrate.pending(context.database):
            return "missing", "missing"
        with context.database.read() as s:
            seen = jobs.workers_seen(s, context.base_model, context.settings.worker_seen_seconds)
    except Exception:  # whatever it is, the database cannot be used
        return "missing", "missing"
    return "ok", "ok" if seen else "missing"


async def _engine(context: Context) -> Part:
    """A replica that generates, holds every live version, and answers at this moment."""
    if not await context.serving.ready():
        return "missing"
    try:
        known = await context.engine.models()
    except PerennialError:
        return "missing"
    return "ok" if context.base_model in known and await context.engine.healthy() else "missing"
