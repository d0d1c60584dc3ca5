"""Engines against rows: what each has loaded, under which name, from where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
from sqlalchemy import select

from service.db.engine import Database
from service.db.tables import Adapter, Version
from service.doctor.findings import Finding
from service.serving.names import PREFIX, served_name
from service.settings import Settings
from service.storage.choice import open_storage

SECONDS = 10.0


Get = Callable[..., httpx2.Response]


def check(database: Database, settings: Settings, get: Get = httpx2.get) -> Iterator[Finding]:
    """Every engine. Loading and unloading is the publisher's: none of this is repaired here."""
    storage = open_storage(settings)
    with database.read() as s:
        rows = s.execute(select(Version.adapter_id, Version.n, Version.uri, Version.digest))
        places = {served_name(a, n): storage.engine_path(uri, digest) for a, n, uri, digest in rows}
        alive = s.execute(select(Adapter.id, Adapter.live_n).where(Adapter.deleted_at.is_(None), Adapter.live_n > 0))
        live = [served_name(a, n) for a, n in alive]
    for url in settings.engines:
        try:
            models = _models(url, settings, get)
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            yield Finding("engine_away", url, f"It does not say what it holds ({type(error).__name__}): start it.")
            continue
        yield from _of(url, models, places, live, settings)


def _models(url: str, settings: Settings, get: Get) -> dict[str, str]:
    """Name -> where it was loaded from."""
    key = settings.engine_api_key.get_secret_value() if settings.engine_api_key else None
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=SECONDS)
    answer.raise_for_status()
    data: list[dict[str, Any]] = answer.json()["data"]
    return {str(m["id"]): str(m.get("root")) for m in data}


def _of(
    url: str, models: dict[str, str], places: dict[str, str], live: list[str], settings: Settings
) -> Iterator[Finding]:
    if settings.base_name and settings.base_name not in models:
        yield Finding(
            "base_not_served", url, f"It does not serve the base model '{settings.base_name}': restart it so."
        )
    for name in live:
        if name not in models:
            yield Finding("live_not_loaded", url, f"It lacks {name}, which answers: is the service running?")
    for name, place in models.items():
        if not name.startswith(PREFIX) or not place.startswith(f"{settings.engine_adapters_root}/"):
            continue  # another service may share the engine
        if name not in places:
            yield Finding("unknown_loaded", url, f"It has loaded {name}, which is no version of ours: restart it.")
        elif place != places[name]:
            message = f"It has loaded {name} from {place}, which is not that version's place: restart it."
            yield Finding("wrong_files_loaded", url, message)
