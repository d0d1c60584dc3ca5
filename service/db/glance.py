"""A row or two by key, read on the event loop itself: no thread, no pool, no session.

Every request waits for two such reads: whose is this key, and which version does the name stand for. The long way takes
0.25 ms of computing for each and two switches between threads, of which each waits for a core on a busy machine; a
glance takes 0.03 ms. It sees what is committed at that moment: nothing is remembered, so a moved alias and a revoked
key count at once. SQLite alone: its readers wait for nobody. Where one would have to wait (another journal mode, a
recovery), where the file is another one, or where anything fails, it raises NotNow: the long way has words for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ClauseElement
from sqlalchemy.dialects import sqlite as sqlite_dialect

MAX_ROWS = 2


class NotNow(Exception):
    """Ask in the ordinary way."""


def plain(statement: ClauseElement) -> str:
    """The statement in SQLite's words, with named parameters; JSON columns come as text."""
    return str(statement.compile(dialect=sqlite_dialect.dialect(paramstyle="named")))


class Glance:
    """One connection that only reads. `driver`: the DB-API module; `path` None: there is nothing to look at."""

    def __init__(self, path: str | None, driver: Any) -> None:
        self._path, self._driver = path, driver
        self._connection: Any = None
        self._file: tuple[int, int] | None = None
        self._turn = threading.Lock()

    def rows(self, sql: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """At most MAX_ROWS rows, by column. Raises NotNow."""
        if self._path is None or not self._turn.acquire(blocking=False):
            raise NotNow
        try:
            cursor = self._opened(self._path).execute(sql, dict(values))
            names = [column[0] for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchmany(MAX_ROWS)]
            cursor.close()  # a statement that is not ended holds its snapshot
            return rows
        except (OSError, self._driver.Error) as error:
            self._close()
            raise NotNow from error
        finally:
            self._turn.release()

    def close(self) -> None:
        with self._turn:
            self._path = None
            self._close()

    def _opened(self, path: str) -> Any:
        """The connection, to the file that lies there now."""
        found = os.stat(path)
        file = found.st_dev, found.st_ino
        if self._connection is None or file != self._file:
            self._close()
            self._connection = self._driver.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA query_only=ON")
            self._file = file
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
