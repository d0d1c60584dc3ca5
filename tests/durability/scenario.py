"""A seeded life of one database: many small transactions through the store, restarts, large texts, lingering readers.

After each transaction that was acknowledged the whole content is noted. The store runs one write at a time, so what a
power cut may leave is known exactly: the content after the last acknowledged transaction, or, if the cut fell into a
transaction, that or the content after it. Nothing else.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.tables import Adapter, Base, Batch, Job
from service.errors import PerennialError
from tests.durability import store_calls as call
from tests.durability.invariants import Query, violations
from tests.durability.recorder import Recorder
from tests.durability.sqlite_driver import driver

TABLES = sorted([*Base.metadata.tables, "alembic_version"])
NAMES = ("helper", "other")
OLD_SQLITE = (3, 45, 0)
"""A version that the product does not trust with a WAL: it then keeps a rollback journal."""


def content(query: Query) -> str:
    """A digest of every row of every table."""
    found = hashlib.blake2b(digest_size=16)
    for table in TABLES:
        found.update(repr((table, [tuple(row) for row in query(f"SELECT * FROM {table} ORDER BY rowid")])).encode())  # noqa: S608
    return found.hexdigest()


def query_of(s: Session) -> Query:
    return lambda sql: [tuple(row) for row in s.connection().exec_driver_sql(sql).fetchall()]


@dataclass
class Life:
    """`early`: say that a transaction is done before it is, which the check must notice. `pragma`: said to every new
    connection after the product's own."""

    directory: Path
    chance: random.Random
    journal: str = "wal"
    early: bool = False
    pragma: str | None = None
    recorder: Recorder = field(default_factory=Recorder)
    leases: list[tuple[str, int, str]] = field(default_factory=list)
    sent: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(idempotency key, adapter's name, text, batch id) of what was acknowledged."""
    tenant: str = ""

    def __post_init__(self) -> None:
        self._readers = ExitStack()
        self.database = self._open()

    def _open(self) -> Database:
        version = None if self.journal == "wal" else OLD_SQLITE
        made = driver(self.recorder.vfs_name, version)
        database = Database(f"sqlite:///{self.directory / 'perennial.db'}", sqlite_driver=made)
        if self.pragma is not None:
            event.listen(database.engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {self.pragma}"))
        return database

    def transact(self, work: Callable[[Session], Any]) -> Any:
        """One acknowledged transaction; None when the store refused it, which changes nothing."""
        self.recorder.mark("began")
        result = None
        try:
            with self.database.write() as s:
                result = work(s)
                if self.early:
                    s.flush()
                    self.recorder.mark("done", content(query_of(s)))
        except PerennialError:
            result = None
        self._note()
        return result

    def _note(self) -> None:
        with self.database.read() as s:
            if broken := violations(query_of(s)):
                raise AssertionError(broken)
            if not self.early:
                self.recorder.mark("done", content(query_of(s)))

    def begin(self) -> None:
        """What every later step needs."""
        self.tenant = self.transact(call.tenant)
        for name in NAMES:  # refused where an earlier life made them
            self.transact(lambda s, name=name: call.create_adapter(s, self.tenant, name).id)

    def run(self, steps: int) -> None:
        self.begin()
        for _ in range(steps):
            self.chance.choices(self._steps, weights=self._weights)[0](self)
        self.close()

    def close(self) -> None:
        self._readers.close()
        self.database.close()

    def _submit(self) -> None:
        key, name = f"key-{self.chance.getrandbits(60)}", self.chance.choice(NAMES)
        text = "a pear " * self.chance.choice((1, 1, 1, 3000))  # the longest lie on pages of their own
        sent = self.transact(lambda s: call.submit(s, self.tenant, name, key, text=text)[0].id)
        if sent is not None:
            self.sent.append((key, name, text, sent))

    def _submit_again(self) -> None:
        if self.sent:
            key, name, text, batch = self.chance.choice(self.sent[-20:])
            found = self.transact(lambda s: call.submit(s, self.tenant, name, key, text=text))
            assert found is None or (found[0].id, found[1]) == (batch, True), "one key, two batches"

    def _claim(self) -> None:
        lease = self.transact(lambda s: call.claim(s, self.chance.choice(("w1", "w2"))))
        if lease is not None:
            self.leases.append(call.plain(lease))

    def _with_lease(self, work: Callable[[Session, str, int, str], Any], keep: bool = False) -> None:
        if self.leases:
            chosen = self.chance.choice(self.leases[-4:])
            self.transact(lambda s: work(s, *chosen))
            if not keep and self.chance.random() < 0.7:  # else the same is said again later
                self.leases.remove(chosen)

    def _beat(self) -> None:
        self._with_lease(lambda s, run, token, _: call.heartbeat(s, run, token, self.chance.randrange(9)), keep=True)

    def _commit(self) -> None:
        self._with_lease(lambda s, run, token, adapter: call.commit(s, run, token, adapter).n)

    def _fail(self) -> None:
        again = self.chance.random() < 0.5
        self._with_lease(lambda s, run, token, _: call.fail(s, run, token, retryable=again))

    def _release(self) -> None:
        self._with_lease(lambda s, run, token, _: call.release(s, run, token))

    def _cancel(self) -> None:
        def some(s: Session) -> None:
            if found := s.scalars(select(Job.id).where(Job.state.in_(("queued", "running"))).limit(1)).first():
                call.cancel(s, found)

        self.transact(some)

    def _requeue(self) -> None:
        def some(s: Session) -> None:
            if found := s.scalars(select(Job.id).where(Job.state == "failed").limit(1)).first():
                call.requeue(s, found)

        self.transact(some)

    def _expire(self) -> None:
        self.transact(call.expire)

    def _head(self, work: Callable[[Session, str, int], None]) -> None:
        def some(s: Session) -> None:
            if found := s.scalars(select(Adapter).where(Adapter.head_n != Adapter.live_n).limit(1)).first():
                work(s, found.id, found.head_n)

        self.transact(some)

    def _publish(self) -> None:
        self._head(call.publish)

    def _reject(self) -> None:
        self._head(lambda s, adapter, n: call.reject(s, adapter, n) if n else None)

    def _restart(self) -> None:
        """The last connection to close moves the WAL into the file and removes it."""
        self.close()
        self.database = self._open()

    def _read_on(self) -> None:
        """A reader of this moment, who stays: SQLite may not move past what he sees."""
        self._readers.close()
        if self.journal == "wal":  # with a rollback journal he would hold up the writer
            s = self._readers.enter_context(self.database.read())
            s.execute(select(Batch.id).limit(1)).all()

    _steps = (
        _submit, _submit_again, _claim, _beat, _commit, _fail, _release, _cancel, _requeue, _expire, _publish,
        _reject, _restart, _read_on,
    )  # fmt: skip
    _weights = (6, 2, 5, 3, 4, 1, 1, 1, 0.5, 1, 3, 0.5, 0.2, 1)
