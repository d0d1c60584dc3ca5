"""The database as a value, and the store's own functions as functions on it.

A state is every row of the tables that the protocol decides by, with what does not matter levelled: random ids get
names from what they are about, times become 0, and a lease is held or has run out. `Store.call` lays a state out in
SQLite, runs one real transaction on it, reads what has become of it and rolls back. The same call on the same state is
made once and remembered.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

from sqlalchemy import Float, Table
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.tables import Base, Tenant
from service.errors import PerennialError
from tests.durability.disk import scratch
from tests.durability.invariants import violations

TABLES = (
    "adapters", "feedback_batches", "feedback_items", "runs", "jobs", "versions", "applications",
)  # fmt: skip
TENANT = "ten_a"
HELD, EXPIRED = 4e12, 1.0
RANDOM = re.compile(r"_[0-9a-f]{24}")
Row = tuple[Any, ...]
State = tuple[tuple[Row, ...], ...]
"""Rows by table, in the order of TABLES."""


class Store:
    """`states` holds every state that was met; elsewhere a state is its index there."""

    def __init__(self) -> None:
        self._place = scratch()
        self._database = Database(f"sqlite:///{self._place}/model.db")
        Base.metadata.create_all(self._database.engine)
        with self._database.write() as s:
            s.add(Tenant(id=TENANT, name="alice", created_at=0.0))
        self.states: list[State] = [tuple(() for _ in TABLES)]
        self.calls = 0
        """Transactions that really ran."""
        self._index = {self.states[0]: 0}
        self._known: dict[tuple[int, Hashable], tuple[int, Any]] = {}
        self._tables = [Base.metadata.tables[name] for name in TABLES]
        self._columns = {t.name: [c.name for c in t.columns] for t in self._tables}

    def close(self) -> None:
        self._database.close()
        shutil.rmtree(self._place)

    def call(self, state: int, key: Hashable, work: Callable[[Session], Any]) -> tuple[int, Any]:
        """The state after one transaction, and its result; a refusal is the result, and changes nothing.

        `key` names the call: equal keys must mean equal calls.
        """
        if (state, key) not in self._known:
            self.calls += 1
            self._known[state, key] = self._run(state, work)
        return self._known[state, key]

    @cache  # noqa: B019 - lives as long as the states do
    def adapter(self, state: int) -> dict[str, Any]:
        """The one adapter's row."""
        return self._dicts(state, "adapters")[0]

    @cache  # noqa: B019
    def jobs(self, state: int) -> list[tuple[str, str]]:
        """(id, state) of every job."""
        return [(row["id"], row["state"]) for row in self._dicts(state, "jobs")]

    @cache  # noqa: B019
    def versions(self, state: int) -> list[tuple[int, int, int]]:
        """(n, parent, token of its run) of every version, by n."""
        rows = self._dicts(state, "versions")
        return sorted((row["n"], row["parent_n"], int(row["run_id"].rsplit("_", 1)[1])) for row in rows)

    def _dicts(self, state: int, table: str) -> list[dict[str, Any]]:
        rows = self.states[state][TABLES.index(table)]
        return [dict(zip(self._columns[table], row, strict=True)) for row in rows]

    def _run(self, state: int, work: Callable[[Session], Any]) -> tuple[int, Any]:
        with self._database.engine.connect() as connection:
            transaction = connection.begin()
            try:
                self._lay_out(connection, self.states[state])
                with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as s:
                    result = work(s)
                    s.flush()
                    return self._read(connection, result)
            except PerennialError as refusal:
                return state, refusal
            finally:
                transaction.rollback()

    def _lay_out(self, connection: Any, state: State) -> None:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        for table, rows in zip(self._tables, state, strict=True):
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                connection.exec_driver_sql(f"INSERT INTO {table.name} VALUES ({marks})", list(rows))  # noqa: S608

    def _read(self, connection: Any, result: Any) -> tuple[int, Any]:
        names: dict[str, str] = {}
        tables = [self._rows(connection, table, names) for table in self._tables]
        state = tuple(tuple(sorted(_renamed(rows, names), key=repr)) for rows in tables)
        if state not in self._index:
            if broken := violations(lambda sql: connection.exec_driver_sql(sql).fetchall()):
                raise AssertionError(broken)
            self._index[state] = len(self.states)
            self.states.append(state)
        return self._index[state], names.get(result, result) if isinstance(result, str) else result

    def _rows(self, connection: Any, table: Table, names: dict[str, str]) -> list[Row]:
        columns = self._columns[table.name]
        found = connection.exec_driver_sql(f"SELECT {', '.join(columns)} FROM {table.name}").fetchall()  # noqa: S608
        rows = [dict(zip(columns, row, strict=True)) for row in found]
        for row in rows:
            _level(table, row)
            if "id" in row and RANDOM.search(row["id"]):
                names[row["id"]] = _name(table.name, row, names)
        return [tuple(row[c] for c in columns) for row in rows]


def _level(table: Table, row: dict[str, Any]) -> None:
    for column in table.columns:
        if isinstance(column.type, Float) and row[column.name] is not None:
            row[column.name] = 0.0 if column.name != "lease_until" else HELD if row[column.name] > 1e9 else EXPIRED
    if table.name == "adapters":
        row["events_n"] = 0


def _name(table: str, row: dict[str, Any], names: dict[str, str]) -> str:
    """What a random id is called from now on."""
    if table == "adapters":
        return f"adp_{row['name']}"
    if table == "runs":
        return f"run_{row['adapter_id'].removeprefix('adp_')}_{row['token']}"
    if table == "feedback_batches":
        return f"fb_{row['idempotency_key']}"
    batch = names.get(row["batch_id"], row["batch_id"]).removeprefix("fb_")
    return f"{table}_{batch}_{row.get('position', 0)}"


def _renamed(rows: list[Row], names: dict[str, str]) -> list[Row]:
    if not names:
        return rows
    return [tuple(_rename(value, names) for value in row) for row in rows]


def _rename(value: Any, names: dict[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    for old, new in names.items():
        if old in value:
            value = value.replace(old, new)
    return value
