"""The database: transactions that either hold on disk or did not happen.

SQLite runs with WAL and `synchronous=FULL` (an acknowledged write survives a power cut) on the SQLite that the
`pysqlite3` wheel bundles: builds before 3.51.3 can corrupt a WAL when two connections write or checkpoint at once, so
on such a build the rollback journal is used instead.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, Float, Insert, create_engine, event, inspect, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.functions import GenericFunction

from service.db.glance import Glance
from service.errors import Unavailable

try:
    from pysqlite3 import dbapi2 as sqlite
except ImportError:  # no wheel for this platform
    import sqlite3 as sqlite

log = logging.getLogger(__name__)

WAL_SAFE_SINCE = (3, 51, 3)


class db_now(GenericFunction[float]):  # noqa: N801 - reads as the SQL function that it is
    """The database's own clock, Unix seconds: clocks of workers and services do not count."""

    type = Float()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


def upsert(session: Session, table: type[DeclarativeBase], row: dict[str, Any], then: dict[str, Any] | None) -> Insert:
    """Insert the row; where its primary key is taken, change what is in `then`, or nothing."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite_dialect.insert
    statement = insert(table).values(row)
    if then is None:
        return statement.on_conflict_do_nothing()
    return statement.on_conflict_do_update(index_elements=list(inspect(table).primary_key), set_=then)


def clock(session: Session) -> float:
    """The database's time, Unix seconds."""
    return session.execute(select(db_now())).scalar_one()


def journal_mode(driver: Any = sqlite) -> str:
    """`wal` where this driver's SQLite build is safe with it, else `truncate`."""
    return "wal" if tuple(driver.sqlite_version_info) >= WAL_SAFE_SINCE else "truncate"


class Database:
    """Hands out sessions; a write session holds the only write lock there is."""

    def __init__(self, url: str, *, busy_seconds: float = 5.0, sqlite_driver: Any = sqlite) -> None:
        """`busy_seconds`: how long a call waits for SQLite's lock or a free connection before it is Unavailable. After
        three times that, PostgreSQL ends a transaction whose process does nothing.
        `sqlite_driver`: the DB-API module that speaks SQLite."""
        is_sqlite = make_url(url).get_backend_name() == "sqlite"
        if is_sqlite:
            self.engine = _sqlite_engine(url, busy_seconds, sqlite_driver)
        else:
            self.engine = _postgresql_engine(url, busy_seconds)
        self.glance = Glance(self.engine.url.database if is_sqlite else None, sqlite_driver)
        """For what every request waits for."""
        self._closed = False
        event.listen(self.engine, "checkin", self._returned)
        # SQLite admits one writer: queue here, in order, instead of polling in its busy handler.
        self._writer = threading.Lock() if is_sqlite else None
        self._busy_seconds = busy_seconds

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent snapshot."""
        with _mapped_errors(), self.engine.connect() as connection, Session(connection) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed, on disk, when the block ends without an exception."""
        with _mapped_errors(), self._turn(), self.engine.connect() as raw:
            connection = raw.execution_options(begin="IMMEDIATE")
            with Session(connection, expire_on_commit=False) as session, session.begin():
                yield session

    def rewrite(self, tables: Sequence[str]) -> None:
        """Write the files anew, so that none holds what is in no row any more. Nobody else can write meanwhile.

        SQLite: the whole database, and its log is emptied. PostgreSQL: these tables, with all that belongs to them; its
        log (WAL) holds old rows until its segments are used again. Raises Unavailable when somebody is in the way.
        """
        with _mapped_errors(), self._turn():
            if self._writer is not None:
                _rewrite_sqlite(self.engine)
            else:
                _rewrite_postgresql(self.engine, tables, self._busy_seconds)

    def close(self) -> None:
        """Close every connection; one that a thread still uses, once it is given back."""
        self._closed = True
        self.glance.close()
        self.engine.dispose()

    def _returned(self, _connection: Any, record: Any) -> None:
        if self._closed:
            record.invalidate()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Our turn to write. Whoever waits too long is told so: threads that wait for ever would stop reads as well."""
        if self._writer is None:
            yield
            return
        if not self._writer.acquire(timeout=2 * self._busy_seconds):
            raise _unavailable()
        try:
            yield
        finally:
            self._writer.release()


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """A dead, locked, damaged or full database is 503, not a stack trace. Defects of our own statements pass."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (DatabaseError, InterfaceError, PoolTimeout) as error:
        # The driver's own words: the statement's parameters, which hold texts of users, are not among them.
        log.error("database: %s: %s", type(error).__name__, getattr(error, "orig", error))
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable("The database does not answer; try again.", code="database_unavailable", retry_after=2)


def _sqlite_engine(url: str, busy_seconds: float, driver: Any) -> Engine:
    engine = create_engine(
        url,
        module=driver,
        connect_args={"timeout": busy_seconds, "check_same_thread": False},
        pool_timeout=busy_seconds,
        hide_parameters=True,  # an error's text goes into a log, and what users wrote must not
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        wanted = (f"journal_mode={journal_mode(driver)}", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")
        for pragma in wanted:
            connection.execute(f"PRAGMA {pragma}")
        record.info["file"] = _identity(engine)

    @event.listens_for(engine, "checkout")
    def _same_file(_connection: Any, record: Any, _proxy: Any) -> None:
        # A file that was deleted or replaced can still be written, and what is written there is lost.
        if record.info["file"] != _identity(engine):
            raise DisconnectionError("the database file is another one")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if mode := connection.get_execution_options().get("begin", "DEFERRED"):
            connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def _postgresql_engine(url: str, busy_seconds: float) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, pool_timeout=busy_seconds, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # A process that freezes, or whose host vanishes, amid a transaction would keep its locks for hours.
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = {int(3000 * busy_seconds)}")
        connection.commit()

    return engine


def _rewrite_sqlite(engine: Engine) -> None:
    """Zeroed when deleted (`secure_delete`), a text may still lie where a page was split or joined: hence VACUUM."""
    with engine.connect().execution_options(begin=None) as connection:
        connection.exec_driver_sql("VACUUM")
        busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
    if busy:
        raise _unavailable()


def _rewrite_postgresql(engine: Engine, tables: Sequence[str], wait_seconds: float) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"SET lock_timeout = {int(wait_seconds * 1000)}")
        try:
            for table in tables:
                connection.exec_driver_sql(f"VACUUM FULL {table}")
        finally:
            connection.exec_driver_sql("RESET lock_timeout")


def _identity(engine: Engine) -> tuple[int, int] | None:
    """Which file lies at the database's path; None when there is none, or the database is in memory."""
    try:
        found = os.stat(engine.url.database or "")
    except OSError:
        return None
    return found.st_dev, found.st_ino
