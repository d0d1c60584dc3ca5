"""The publisher makes the engine serve what the database says, again and again until it is so.

Every version is loaded under a name that is never used for anything else, so no cache in the engine can mix two
versions. Order: load the new head, move the alias in one transaction, drain the old version, unload it late.
Level-triggered: each pass compares the wanted versions with the engine's own list, so a restart of either side, a lost
reply or a slow load needs no special case.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import anyio
from sqlalchemy import select

from api_schemas.worker import FileEntry
from service import admission, archive
from service.bell import Bell
from service.db.engine import Database, clock
from service.db.tables import Adapter, Version
from service.engine_client import EngineAway, EngineClient, LoadRefused
from service.errors import NotFound, PerennialError, Unavailable, VersionRejected
from service.settings import Settings
from service.store import adapters, versions

log = logging.getLogger(__name__)


def served_name(adapter_id: str, n: int) -> str:
    """The engine's name of one version; adapter ids are never used twice."""
    return f"{adapter_id}-v{n}"


class Publisher:
    def __init__(self, database: Database, engine: EngineClient, settings: Settings) -> None:
        self._db = database
        self._engine = engine
        self._settings = settings
        self.bell = Bell()
        """Ring after a commit: a new head wants to be served."""
        self._loaded: set[str] = set()
        self._in_flight: Counter[str] = Counter()
        self._last_used: dict[str, float] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def hold(self, adapter_id: str, n: int) -> AsyncIterator[str]:
        """Serve one request from version `n` > 0: loaded on entry, not unloaded before exit. Yields its served name."""
        name = served_name(adapter_id, n)
        self._in_flight[name] += 1
        try:
            await self.ensure_loaded(adapter_id, n)
            yield name
        finally:
            self._in_flight[name] -= 1
            self._last_used[name] = time.monotonic()

    def forget(self, name: str) -> None:
        """The engine says that it does not know this name: load it again before the next use."""
        self._loaded.discard(name)

    async def ensure_loaded(self, adapter_id: str, n: int) -> None:
        """Load a version unless it is. Raises Unavailable, VersionRejected."""
        name = served_name(adapter_id, n)
        if name in self._loaded:
            return
        async with self._loading.setdefault(name, asyncio.Lock()):
            if name not in self._loaded:
                await self._load(adapter_id, n, name)
                self._last_used[name] = time.monotonic()
                self._loaded.add(name)

    async def _load(self, adapter_id: str, n: int, name: str) -> None:
        uri, files = await anyio.to_thread.run_sync(self._files_of, adapter_id, n)
        if not self._settings.adapters_root.is_dir():  # a lost mount is no verdict on the version
            raise Unavailable("The adapters directory is away; try again.", code="storage_unavailable", retry_after=5)
        await anyio.to_thread.run_sync(admission.check_files, self._settings.adapters_root / uri, files)
        path = str(self._settings.engine_adapters_root / uri / "adapter")
        try:
            await self._engine.load(name, path)
        except LoadRefused as first:
            # A dying engine fails in the same way as a bad adapter: ask again before the verdict.
            if not await self._engine.healthy():
                raise Unavailable("The engine is not well; try again.", code="engine_unavailable") from first
            try:
                await self._engine.load(name, path)
            except LoadRefused as second:
                raise VersionRejected(f"engine_refused: {second}") from second

    def _files_of(self, adapter_id: str, n: int) -> tuple[str, list[FileEntry]]:
        with self._db.read() as s:
            if s.get_one(Adapter, adapter_id).deleted_at is not None:  # its files may go at any moment
                raise NotFound("The adapter was deleted.", code="adapter_not_found", param="model")
            version = s.get_one(Version, (adapter_id, n))
            return version.uri, [FileEntry.model_validate(f) for f in version.files]

    async def run(self) -> None:
        """Converge for ever: at once when rung, else every `reconcile_seconds`."""
        while True:
            ticket = self.bell.ticket()
            try:
                await self.converge()
            except PerennialError as error:
                log.warning("publisher: %s", error.code)
            except Exception:
                log.exception("publisher: pass failed")
            await Bell.wait(ticket, self._settings.reconcile_seconds)

    async def converge(self) -> None:
        """One pass: reload what the engine lost, publish new heads, unload what nobody wants."""
        known = await self._engine.models()
        self._loaded &= known.keys()
        wanted = await anyio.to_thread.run_sync(self._pointers)
        for adapter in wanted:
            if adapter.live_n:
                name = served_name(adapter.adapter_id, adapter.live_n)
                await self._alone(name, self.ensure_loaded(adapter.adapter_id, adapter.live_n))
        for adapter in wanted:
            if adapter.head_n != adapter.live_n:
                name = served_name(adapter.adapter_id, adapter.head_n)
                await self._alone(name, self._publish(adapter.adapter_id, adapter.head_n))
        await self._unload_unwanted(known.keys() | self._loaded)
        await self._purge_deleted()

    def _pointers(self) -> list[adapters.Pointers]:
        with self._db.read() as s:
            return adapters.pointers(s)

    async def _alone(self, name: str, step: Awaitable[None]) -> None:
        """One broken version must not keep the others from being served. Raises EngineAway: then none can be."""
        try:
            await step
        except EngineAway:
            raise
        except PerennialError as error:
            log.error("publisher: %s: %s: %s", name, error.code, error.message)

    async def _publish(self, adapter_id: str, n: int) -> None:
        if n:
            try:
                await self.ensure_loaded(adapter_id, n)
            except VersionRejected as error:
                log.warning("publisher: %s rejected: %s", served_name(adapter_id, n), error.message)
                await anyio.to_thread.run_sync(self._reject, adapter_id, n, error.message)
                return
        await anyio.to_thread.run_sync(self._move_alias, adapter_id, n)

    def _reject(self, adapter_id: str, n: int, reason: str) -> None:
        with self._db.write() as s:
            versions.reject(s, adapter_id, n, reason)

    def _move_alias(self, adapter_id: str, n: int) -> None:
        """In one transaction, and only if `n` is still wanted: a promotion may have come in between."""
        with self._db.write() as s:
            adapter = adapters.locked(s, adapter_id)
            if adapter.head_n == n and adapter.deleted_at is None:
                adapters.set_live(s, adapter, n)

    async def _unload_unwanted(self, known: set[str]) -> None:
        wanted = {served_name(a.adapter_id, a.live_n) for a in await anyio.to_thread.run_sync(self._pointers)}
        for name in known - wanted:
            if name.startswith("adp_"):  # the base model and adapters of others stay
                await self._alone(name, self._unload_if_idle(name))

    async def _unload_if_idle(self, name: str) -> None:
        async with self._loading.setdefault(name, asyncio.Lock()):
            recently = time.monotonic() - self._settings.drain_seconds
            if self._in_flight[name] or self._last_used.get(name, 0.0) > recently:
                return
            self._loaded.discard(name)
            await self._engine.unload(name)
            if not self._in_flight[name]:  # else a request has come in meanwhile and waits for the lock
                del self._in_flight[name], self._loading[name]
                self._last_used.pop(name, None)

    async def _purge_deleted(self) -> None:
        """Remove the files of deleted adapters that the engine does not know and nobody is about to load.

        Deleted adapters are not loaded any more: whoever was let in before counts as in flight here.
        """
        if not (gone := await anyio.to_thread.run_sync(self._deleted)):
            return
        names = {*await self._engine.models(), *self._loaded, *(name for name, n in self._in_flight.items() if n)}
        for adapter_id in set(gone) - {name.rsplit("-v", 1)[0] for name in names}:
            await anyio.to_thread.run_sync(self._purge, adapter_id)

    def _deleted(self) -> list[str]:
        with self._db.read() as s:
            return list(
                s.scalars(select(Adapter.id).where(Adapter.deleted_at.is_not(None), Adapter.purged_at.is_(None)))
            )

    def _purge(self, adapter_id: str) -> None:
        shutil.rmtree(self._settings.adapters_root / adapter_id, ignore_errors=True)
        with self._db.write() as s:
            for digest in s.scalars(select(Version.digest).where(Version.adapter_id == adapter_id)):
                archive.path_of(self._settings.archives_root, digest).unlink(missing_ok=True)
            s.get_one(Adapter, adapter_id).purged_at = clock(s)
