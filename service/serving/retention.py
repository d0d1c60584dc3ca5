"""What goes with time: files of deleted adapters, of versions beyond `keep_versions` or replaced by a rebuild, of
uploads and runs that came to nothing; and rollouts and feedback beyond their days.

Files go in two steps, each safe to be killed in: the row says that they go, and from then on nobody loads them; once
no engine knows a name of them, they are removed. An engine that reads a directory which is gone dies.
"""

from __future__ import annotations

import time

import anyio
from sqlalchemy import select

from service import archive
from service.db.engine import Database, clock
from service.db.tables import Adapter, Version
from service.serving import garbage
from service.serving.fleet import Fleet
from service.serving.names import adapter_of, served_name
from service.serving.office import Office
from service.settings import Settings
from service.storage.base import Storage
from service.store import expiry, retention, scrubbing

DAY = 86400.0
EXPIRING, ROUNDS = 200, 10
"""Most rows of one transaction, and most transactions of one pass: others write in between."""


class Retention:
    def __init__(self, database: Database, fleet: Fleet, storage: Storage, settings: Settings) -> None:
        self._db = database
        self._fleet = fleet
        self._storage = storage
        self._settings = settings
        self._started = time.monotonic()
        self._look_again = 0.0

    async def tidy(self, office: Office) -> None:
        """One pass. Raises Unavailable when a replica does not answer: it may know any name."""
        if time.monotonic() > self._look_again:
            self._look_again = time.monotonic() + self._storage.sweep_seconds
            await anyio.to_thread.run_sync(self._leftovers)
        if self._settings.keep_versions is not None:
            await anyio.to_thread.run_sync(self._doom, office, self._settings.keep_versions, self.asked_lately())
        await anyio.to_thread.run_sync(self._expire)
        deleted, doomed = await anyio.to_thread.run_sync(self._leaving)
        if not deleted and not doomed:
            return
        # Neither is loaded any more: whoever was let in before counts as in flight here.
        names = office.others.holds | await self._fleet.known()
        busy = {adapter_of(name) for name in names}
        for adapter_id in deleted:
            if adapter_id not in busy:
                await anyio.to_thread.run_sync(self._purge, adapter_id)
        for adapter_id, n in doomed:
            if served_name(adapter_id, n) not in names:
                await anyio.to_thread.run_sync(self._remove, adapter_id, n)

    def asked_lately(self) -> set[str] | None:
        """Names that had a request within the grace time. None: this process has not watched for so long."""
        since, asked = time.monotonic() - self._settings.retention_grace_seconds, self._fleet.last_asked
        for name in [n for n, at in asked.items() if at < since]:
            del asked[name]
        return set(asked) if self._started <= since else None

    def _doom(self, office: Office, keep: int, here: set[str] | None) -> None:
        elsewhere = office.others.asked
        if here is None or elsewhere is None:
            return
        asked = here | elsewhere | office.others.holds
        with self._db.write() as s:
            office.check(s)
            before = clock(s) - self._settings.retention_grace_seconds
            retention.doom(s, keep, before, asked | self._fleet.in_use())

    def _leftovers(self) -> None:
        garbage.collect(self._db, self._storage)

    def _expire(self) -> None:
        """Texts that have had their time, a bounded number; and the bytes of what was erased while the database was
        busy."""
        with self._db.read() as s:
            now, scrub = clock(s), scrubbing.due(s) is not None
        for days, expire in (
            (self._settings.keep_feedback_days, expiry.expire_feedback),
            (self._settings.keep_rollouts_days, expiry.expire_rollouts),
        ):
            for _ in range(ROUNDS if days is not None else 0):
                with self._db.write() as s:
                    gone = expire(s, now - (days or 0.0) * DAY, EXPIRING)
                if gone < EXPIRING:
                    break
        if scrub and self._settings.scrub_at_once:
            scrubbing.scrub(self._db)

    def _leaving(self) -> tuple[list[str], list[tuple[str, int]]]:
        with self._db.read() as s:
            spent = retention.spent(s)
        if spent:
            with self._db.write() as s:
                retention.doom_spent(s, spent)
        with self._db.read() as s:
            gone = select(Adapter.id).where(Adapter.deleted_at.is_not(None), Adapter.purged_at.is_(None))
            return list(s.scalars(gone)), retention.doomed(s)

    def _purge(self, adapter_id: str) -> None:
        self._storage.purge(adapter_id)
        with self._db.write() as s:
            for digest in s.scalars(select(Version.digest).where(Version.adapter_id == adapter_id)):
                archive.path_of(self._settings.archives_root, digest).unlink(missing_ok=True)
            s.get_one(Adapter, adapter_id).purged_at = clock(s)

    def _remove(self, adapter_id: str, n: int) -> None:
        with self._db.read() as s:
            version = s.get_one(Version, (adapter_id, n))
        if not self._storage.clear(*version.uri.split("/")):
            return  # tried again in the next pass
        archive.path_of(self._settings.archives_root, version.digest).unlink(missing_ok=True)
        with self._db.write() as s:
            s.get_one(Version, (adapter_id, n)).files_removed_at = clock(s)
