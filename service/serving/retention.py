"""Files that go: those of deleted adapters, of versions beyond `keep_versions`, and uploads that came to nothing.

Two steps, each safe to be killed in: the row says that the files go, and from then on nobody loads them; once no engine
knows a name of them, they are removed. An engine that reads a directory which is gone dies.
"""

from __future__ import annotations

import shutil
import time

import anyio
from sqlalchemy import select

from service import archive, uploads
from service.db.engine import Database, clock
from service.db.tables import Adapter, Version
from service.serving.fleet import Fleet
from service.serving.names import adapter_of, served_name
from service.settings import Settings
from service.store import retention

LEFTOVERS_SECONDS = 60.0
"""How often uploads are looked through for what nobody committed."""


class Retention:
    def __init__(self, database: Database, fleet: Fleet, settings: Settings) -> None:
        self._db = database
        self._fleet = fleet
        self._settings = settings
        self._started = time.monotonic()
        self._look_again = 0.0

    async def tidy(self) -> None:
        """One pass. Raises Unavailable when a replica does not answer: it may know any name."""
        if time.monotonic() > self._look_again:
            self._look_again = time.monotonic() + LEFTOVERS_SECONDS
            await anyio.to_thread.run_sync(uploads.clear_stale, self._settings.adapters_root)
        if self._settings.keep_versions is not None:
            await anyio.to_thread.run_sync(self._doom, self._settings.keep_versions, self._asked_lately())
        deleted, doomed = await anyio.to_thread.run_sync(self._leaving)
        if not deleted and not doomed:
            return
        # Neither is loaded any more: whoever was let in before counts as in flight here.
        names = await self._fleet.known()
        busy = {adapter_of(name) for name in names}
        for adapter_id in deleted:
            if adapter_id not in busy:
                await anyio.to_thread.run_sync(self._purge, adapter_id)
        for adapter_id, n in doomed:
            if served_name(adapter_id, n) not in names:
                await anyio.to_thread.run_sync(self._remove, adapter_id, n)

    def _asked_lately(self) -> set[str] | None:
        """Names that had a request within the grace time. None: this process has not watched for so long."""
        since, asked = time.monotonic() - self._settings.retention_grace_seconds, self._fleet.last_asked
        for name in [n for n, at in asked.items() if at < since]:
            del asked[name]
        return set(asked) if self._started <= since else None

    def _doom(self, keep: int, asked: set[str] | None) -> None:
        if asked is None:
            return
        with self._db.write() as s:
            before = clock(s) - self._settings.retention_grace_seconds
            retention.doom(s, keep, before, asked | self._fleet.in_use())

    def _leaving(self) -> tuple[list[str], list[tuple[str, int]]]:
        with self._db.read() as s:
            gone = select(Adapter.id).where(Adapter.deleted_at.is_not(None), Adapter.purged_at.is_(None))
            return list(s.scalars(gone)), retention.doomed(s)

    def _purge(self, adapter_id: str) -> None:
        shutil.rmtree(self._settings.adapters_root / adapter_id, ignore_errors=True)
        with self._db.write() as s:
            for digest in s.scalars(select(Version.digest).where(Version.adapter_id == adapter_id)):
                archive.path_of(self._settings.archives_root, digest).unlink(missing_ok=True)
            s.get_one(Adapter, adapter_id).purged_at = clock(s)

    def _remove(self, adapter_id: str, n: int) -> None:
        with self._db.read() as s:
            version = s.get_one(Version, (adapter_id, n))
        shutil.rmtree(self._settings.adapters_root / version.uri, ignore_errors=True)
        if (self._settings.adapters_root / version.uri).exists():
            return  # tried again in the next pass
        archive.path_of(self._settings.archives_root, version.digest).unlink(missing_ok=True)
        with self._db.write() as s:
            s.get_one(Version, (adapter_id, n)).files_removed_at = clock(s)
