"""The publisher makes the replicas serve what the database says, again and again until it is so.

Every version is loaded under a name that is never used for anything else, so no cache in an engine can mix two
versions. Order: load the new head, move the alias in one transaction, drain the old version, unload it late.
Level-triggered: each pass compares the wanted versions with the engine's own list, so a restart of either side, a lost
reply or a slow load needs no special case. Each replica has passes of its own: a slow one holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

import anyio

from service.bell import Bell
from service.db.engine import Database
from service.engine_answers import EngineAway
from service.errors import PerennialError, VersionRejected
from service.serving.copies import Copies
from service.serving.fleet import Fleet
from service.serving.names import served_name
from service.serving.office import Office
from service.serving.replica import Replica
from service.serving.retention import Retention
from service.settings import Settings
from service.storage.base import Storage
from service.store import adapters, versions

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.5
"""How soon a replica that is away is looked for again."""


class Publisher:
    def __init__(self, database: Database, fleet: Fleet, storage: Storage, settings: Settings) -> None:
        self._db = database
        self._fleet = fleet
        self._storage = storage
        self._settings = settings
        self._retention = Retention(database, fleet, storage, settings)
        self._copies = Copies(database, fleet, storage, settings)
        self.office = Office(
            database, settings.publisher_lease_seconds, lambda: (fleet.in_use(), self._retention.asked_lately())
        )
        fleet.on_empty(self._passes)

    @property
    def bell(self) -> Bell:
        """Ring after a commit: a new head wants to be served."""
        return self._fleet.bell

    async def run(self) -> None:
        """Converge for ever, every replica at its own pace."""
        await self._attend()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.office.attend_for_ever())
            for replica in self._fleet.replicas:
                tasks.create_task(self._follow(replica))
            tasks.create_task(self._tidy_for_ever())

    async def converge(self) -> None:
        """One whole pass over every replica, then the files that nobody needs any more."""
        await self._attend()
        await self._passes()
        await self._attend()  # what was let go is said at once
        await self._tidy()

    async def _attend(self) -> None:
        try:
            await self.office.attend()
        except PerennialError as error:
            log.warning("publisher: the election has to wait: %s", error.code)
        except Exception:
            log.exception("publisher: the election failed")

    async def _passes(self) -> None:
        await asyncio.gather(*(self.reconcile(r) for r in self._fleet.replicas))

    async def _follow(self, replica: Replica) -> None:
        while True:
            ticket = self.bell.ticket()
            await self.reconcile(replica)
            pause = self._settings.reconcile_seconds
            await Bell.wait(ticket, pause if replica.up else min(pause, RETRY_SECONDS))

    async def _tidy_for_ever(self) -> None:
        while True:
            ticket = self.bell.ticket()
            await self._tidy()
            await Bell.wait(ticket, self._settings.reconcile_seconds)

    async def _tidy(self) -> None:
        try:
            await self._copies.tidy()
            if self.office.leads:
                await self._retention.tidy(self.office)
        except PerennialError as error:
            log.info("publisher: files stay for now: %s", error.code)
        except Exception:
            log.exception("publisher: tidying failed")

    async def reconcile(self, replica: Replica) -> None:
        """One pass over one replica: reload what it lost, publish new heads, unload what nobody wants."""
        async with replica.turn:
            try:
                await self._pass(replica)
            except PerennialError as error:
                if replica.up:
                    log.warning("publisher: %s: %s", replica.url, error.code)
                replica.down()
            except Exception:
                log.exception("publisher: pass over %s failed", replica.url)

    async def _pass(self, replica: Replica) -> None:
        known = await replica.observe()
        await replica.check_generates()
        wanted = await anyio.to_thread.run_sync(self._pointers)
        for adapter in wanted:
            if adapter.live_n:
                name = served_name(adapter.adapter_id, adapter.live_n)
                await self._alone(name, replica.ensure_loaded(adapter.adapter_id, adapter.live_n, name))
        if not replica.up:
            log.info("publisher: %s takes traffic", replica.url)
        replica.up = True
        for adapter in wanted:
            if adapter.head_n != adapter.live_n:
                name = served_name(adapter.adapter_id, adapter.head_n)
                await self._alone(name, self._offer(replica, adapter.adapter_id, adapter.head_n))
        await self._unload_unwanted(replica, known | replica.loaded)
        replica.sweep()

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

    async def _offer(self, replica: Replica, adapter_id: str, n: int) -> None:
        """Load a head here, then decide for all replicas."""
        try:
            if n:
                await replica.ensure_loaded(adapter_id, n, served_name(adapter_id, n))
        except VersionRejected as error:
            log.warning("publisher: %s refused by %s: %s", served_name(adapter_id, n), replica.url, error.message)
        if self.office.leads:
            await self._decide(adapter_id, n)

    async def _decide(self, adapter_id: str, n: int) -> None:
        """Move the alias when enough of the replicas that are up hold the version; reject it when they will not.

        `publish_when` any: one is enough, and all must refuse. all: every one, and one refusal is enough.
        """
        name, up = served_name(adapter_id, n), self._fleet.up
        having = [r for r in up if not n or name in r.loaded]
        refusals = [e for r in up if r not in having and (e := r.refusal(name)) is not None]
        needs_all = self._settings.publish_when == "all"
        if len(having) == len(up) or (having and not needs_all):
            await anyio.to_thread.run_sync(self._move_alias, adapter_id, n)
        elif refusals and (needs_all or len(refusals) == len(up)):
            await anyio.to_thread.run_sync(self._reject, adapter_id, n, refusals[0])

    def _reject(self, adapter_id: str, n: int, error: VersionRejected) -> None:
        with self._db.write() as s:
            self.office.check(s)
            versions.reject(s, adapter_id, n, error.message, error.code)

    def _move_alias(self, adapter_id: str, n: int) -> None:
        """In one transaction, and only if `n` is still wanted: a promotion may have come in between."""
        with self._db.write() as s:
            self.office.check(s)
            adapter = adapters.locked(s, adapter_id)
            if adapter.head_n == n and adapter.live_n != n and adapter.deleted_at is None:
                adapters.set_live(s, adapter, n)

    async def _unload_unwanted(self, replica: Replica, known: set[str]) -> None:
        wanted = await anyio.to_thread.run_sync(self._pointers)
        keep = {served_name(a.adapter_id, n) for a in wanted for n in (a.live_n, a.head_n)}
        if not self.office.leads or self._storage.remote:
            # Let go of them first: what any process holds is not unloaded, so two that wait for each other would wait
            # for ever.
            for name in replica.loaded - keep:
                replica.let_go_if_idle(name)
        if not self.office.leads and not self._storage.remote:
            return  # the publisher does it; with remote storage it cannot reach here
        if known - keep:
            await self._attend()
        for name in known - keep - self.office.others.holds:
            await self._alone(name, replica.unload_if_idle(name))
