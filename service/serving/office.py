"""This process's part in the election of the publisher.

Every process serves and looks after its own view of the engines. One at a time publishes: it decides about new
versions, unloads what nobody wants, and removes files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection

import anyio
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.errors import PerennialError
from service.store import election

log = logging.getLogger(__name__)
PUBLISHER = "publisher"


class Office:
    def __init__(
        self, database: Database, seconds: float, report: Callable[[], tuple[set[str], set[str] | None]]
    ) -> None:
        """`seconds`: the lease. `report`: names that this process may answer with, and those asked for lately."""
        self.id = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(6)}"
        self.others = election.Others(frozenset(), None)
        """As of the latest `attend`."""
        self._db = database
        self._seconds = seconds
        self._report = report
        self._token: int | None = None
        self._until = 0.0
        self._turn = asyncio.Lock()

    @property
    def leads(self) -> bool:
        """Whether this process publishes, as far as it knows; `check` knows for sure."""
        return self._token is not None and time.monotonic() < self._until

    async def attend(self) -> None:
        """Say what is held here, keep the office or take it if it is free. Raises Unavailable."""
        async with self._turn:
            began = time.monotonic()
            holds, asked = self._report()
            token = await anyio.to_thread.run_sync(self._attend, holds, asked)
            if token is not None and token != self._token:
                log.info("publisher: %s publishes from now on (token %d)", self.id, token)
            self._token, self._until = token, began + self._seconds

    def _attend(self, holds: Collection[str], asked: Collection[str] | None) -> int | None:
        with self._db.write() as s:
            election.report(s, self.id, holds, asked, self._seconds)
            token = election.stand(s, PUBLISHER, self.id, self._seconds)
            self.others = election.others(s, self.id)
            return token

    async def attend_for_ever(self) -> None:
        """Three times per lease, whatever else takes its time."""
        while True:
            await asyncio.sleep(self._seconds / 3)
            try:
                await self.attend()
            except PerennialError as error:
                log.warning("publisher: the election has to wait: %s", error.code)
            except Exception:
                log.exception("publisher: the election failed")

    def check(self, s: Session) -> None:
        """In every transaction that only the publisher may make. Raises NotLeader."""
        if self._token is None:
            raise election.NotLeader("Another process publishes.")
        election.check(s, PUBLISHER, self._token)

    async def resign(self) -> None:
        """At shutdown: the next process need not wait for the lease to run out."""
        async with self._turn:
            self._token = None
            await anyio.to_thread.run_sync(self._resign)

    def _resign(self) -> None:
        try:
            with self._db.write() as s:
                election.resign(s, PUBLISHER, self.id)
        except PerennialError as error:
            log.info("publisher: the lease will run out by itself: %s", error.code)
