"""What this host has of its own, whichever process publishes: archives, half uploads, and copies of remote versions."""

from __future__ import annotations

import time

import anyio
from sqlalchemy import select

from service import archive, uploads
from service.db.engine import Database
from service.db.tables import Version
from service.serving.fleet import Fleet
from service.serving.names import served_name
from service.settings import Settings
from service.storage.base import Storage
from service.store import adapters

LOOK_SECONDS = 600.0


class Copies:
    def __init__(self, database: Database, fleet: Fleet, storage: Storage, settings: Settings) -> None:
        self._db = database
        self._fleet = fleet
        self._storage = storage
        self._settings = settings
        self._look_again = 0.0

    async def tidy(self) -> None:
        """Every ten minutes. Raises Unavailable when an engine does not answer: it may know any version."""
        if time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + LOOK_SECONDS
        await anyio.to_thread.run_sync(self._local)
        if self._storage.remote:
            names = await self._fleet.known()
            await anyio.to_thread.run_sync(self._evict, names)

    def _local(self) -> None:
        uploads.clear_stale(self._settings.adapters_root)
        for path in archive.orphans(self._db, self._settings.archives_root):
            path.unlink(missing_ok=True)

    def _evict(self, names: set[str]) -> None:
        """An engine may read a directory again as long as it knows the version's name."""
        with self._db.read() as s:
            wanted = {served_name(p.adapter_id, n) for p in adapters.pointers(s) for n in (p.live_n, p.head_n)} | names
            rows = s.execute(select(Version.adapter_id, Version.n, Version.digest))
            keep = {digest for adapter_id, n, digest in rows if served_name(adapter_id, n) in wanted}
        self._storage.tidy(keep)
