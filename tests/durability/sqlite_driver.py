"""SQLite through APSW as a DB-API module, so that the product's own engine and store run on a file system of ours.

Only what SQLAlchemy asks of a driver. `driver(vfs)` gives the module for one virtual file system of APSW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import apsw

Row = tuple[Any, ...]


class Error(Exception):
    pass


class DatabaseError(Error):
    pass


class IntegrityError(DatabaseError):
    pass


class OperationalError(DatabaseError):
    pass


def _translated(error: apsw.Error) -> Error:
    kind = IntegrityError if isinstance(error, apsw.ConstraintError) else OperationalError
    return kind(str(error))


class Cursor:
    arraysize = 1
    rowcount = -1

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._rows: Iterator[Row] = iter(())
        self.description: Any = None

    @property
    def lastrowid(self) -> int:
        return self._connection.last_insert_rowid()

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        """To its end at once; the rows are kept until they are fetched."""
        cursor, names = self._connection.cursor(), []

        def look(inner: apsw.Cursor, *_: Any) -> bool:  # the only moment at which a query without rows has names
            names.extend(inner.get_description())
            return True

        cursor.exec_trace = look
        before = self._connection.total_changes()
        try:
            self._rows = iter(cursor.execute(statement, tuple(parameters)).fetchall())
        except apsw.Error as error:
            raise _translated(error) from error
        self.rowcount = self._connection.total_changes() - before
        self.description = [(name, *[None] * 6) for name, _ in names] or None
        return self

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> Cursor:
        self.rowcount = sum(self.execute(statement, row).rowcount for row in rows)
        return self

    def fetchone(self) -> Row | None:
        return next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[Row]:
        return [row for _, row in zip(range(size or self.arraysize), self._rows, strict=False)]

    def fetchall(self) -> list[Row]:
        return list(self._rows)

    def close(self) -> None:
        self._rows = iter(())


class Connection:
    isolation_level: str | None = ""

    def __init__(self, path: str, vfs: str | None, timeout: float) -> None:
        self._connection = apsw.Connection(path, vfs=vfs)
        self._connection.set_busy_timeout(int(timeout * 1000))

    def cursor(self) -> Cursor:
        return Cursor(self._connection)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        return self.cursor().execute(statement, parameters)

    def create_function(self, name: str, arguments: int, function: Callable[..., Any], **_: Any) -> None:
        self._connection.create_scalar_function(name, function, arguments)

    def commit(self) -> None:
        self._end("COMMIT")

    def rollback(self) -> None:
        self._end("ROLLBACK")

    def _end(self, word: str) -> None:
        if not self._connection.get_autocommit():
            self.execute(word)

    def close(self) -> None:
        self._connection.close()


def _connect(path: str, *, vfs: str | None, timeout: float = 5.0, check_same_thread: bool = False) -> Connection:
    return Connection(path, vfs, timeout)


def driver(vfs: str | None = None, version: tuple[int, int, int] | None = None) -> Any:
    """A DB-API module. `version`: what it says of itself; an old one makes the product choose its rollback journal."""
    own = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    return SimpleNamespace(
        connect=partial(_connect, vfs=vfs),
        paramstyle="qmark",
        apilevel="2.0",
        threadsafety=1,
        sqlite_version_info=version or own,
        sqlite_version=".".join(map(str, version or own)),
        Error=Error,
        DatabaseError=DatabaseError,
        IntegrityError=IntegrityError,
        OperationalError=OperationalError,
        InterfaceError=Error,
        ProgrammingError=DatabaseError,
        DataError=DatabaseError,
        NotSupportedError=DatabaseError,
        InternalError=DatabaseError,
        Binary=memoryview,
    )
