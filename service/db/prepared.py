"""Statements that run all the time: compiled once for each dialect, and one statement for any number of rows.

SQLAlchemy computes longer on a statement than SQLite does on the few rows that it is about, so a statement that is in
the driver's words already goes straight to the driver, in the connection's transaction. And a driver gives the
interpreter's lock away for each row that it writes: beside a busy event loop it waits to have it back. So the rows of a
statement travel as one JSON text, which the database takes apart; the statement's own text never changes, so it stays
prepared. To SQLite a row is a list, not an object: it looks for a place twice as fast as for a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import (
    JSON,
    Column,
    FromClause,
    Select,
    String,
    Text,
    UpdateBase,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
)
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError

Statement = Select[Any] | UpdateBase
Build = Callable[[Dialect, FromClause], Statement]


class Prepared:
    """`build` gives the statement in the words of a dialect, about rows of these columns; JSON among them is text.
    Results are the driver's own: JSON may come as text."""

    def __init__(self, build: Build, *columns: Column[Any]) -> None:
        self._build, self._columns = build, columns
        self._names = [c.name for c in columns]
        self._compiled: dict[str, tuple[str, Sequence[str] | None, Mapping[str, Any]]] = {}

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]] = ()) -> Sequence[tuple[Any, ...]]:
        """Every row of the result. `rows` have a value for each column."""
        sql, order, fixed = self._words(connection.dialect)
        lists = connection.dialect.name == "sqlite"
        told = [[row[name] for name in self._names] for row in rows] if lists else rows
        sent = {**fixed, "rows": orjson.dumps(told).decode()}
        driver = connection.dialect.loaded_dbapi
        cursor = connection.connection.cursor()
        try:
            cursor.execute(sql, [sent[name] for name in order] if order is not None else sent)
            return cursor.fetchall() if cursor.description else ()
        except driver.Error as error:  # as SQLAlchemy would have it
            raise DBAPIError.instance(
                sql, None, error, driver.Error, hide_parameters=True, dialect=connection.dialect
            ) from error
        finally:
            cursor.close()

    def _words(self, dialect: Dialect) -> tuple[str, Sequence[str] | None, Mapping[str, Any]]:
        if (known := self._compiled.get(dialect.name)) is None:
            compiled = self._build(dialect, _given(dialect, self._columns)).compile(dialect=dialect)
            known = self._compiled[dialect.name] = str(compiled), compiled.positiontup, compiled.params
        return known


def _given(dialect: Dialect, columns: Sequence[Column[Any]]) -> FromClause:
    """The rows that `run` is given, as a table of these columns."""
    rows = bindparam("rows", type_=Text)
    if dialect.name == "postgresql":
        # Text of any length: what is longer than its column is looked for, and not there.
        typed = [column(c.name, Text() if isinstance(c.type, JSON | String) else c.type) for c in columns]
        values = func.json_to_recordset(cast(rows, JSON)).table_valued(*typed)
        return values.render_derived(name="given", with_types=True)
    each = func.json_each(rows).table_valued("value", name="each")
    fields = [func.json_extract(each.c.value, literal_column(f"'$[{n}]'")).label(c.name) for n, c in enumerate(columns)]
    return select(*fields).subquery("given")


def inserted(*columns: Column[Any]) -> Prepared:
    """Inserts the rows that it is given into the columns' table. No default is filled in."""

    def build(dialect: Dialect, rows: FromClause) -> Statement:
        to_json = dialect.name == "postgresql"  # SQLite keeps JSON as text
        values = [
            cast(rows.c[c.name], JSON) if to_json and isinstance(c.type, JSON) else rows.c[c.name] for c in columns
        ]
        return columns[0].table.insert().from_select(list(columns), select(*values), include_defaults=False)

    return Prepared(build, *columns)
