"""All checks, in an order in which a repair helps those that come after it."""

from __future__ import annotations

from collections.abc import Iterator

from service.db import migrate
from service.db.engine import Database, journal_mode
from service.doctor import engines, files, history, pointers
from service.doctor.findings import Finding
from service.settings import Settings
from service.store import scrubbing


def examine(database: Database, settings: Settings, *, grace: float, with_engines: bool) -> Iterator[Finding]:
    """Lazily: each finding may be repaired before the next is looked for. Raises Unavailable."""
    if migrate.pending(database):
        yield Finding(
            "schema_behind", settings.db_url.split("@")[-1], "Run `perennial migrate`; the rest waits for it."
        )
        return
    yield from _storage(database)
    yield from pointers.check(database, settings.lease_seconds)
    yield from history.check(database)
    yield from files.check(database, settings, grace)
    if with_engines:
        yield from engines.check(database, settings)


def _storage(database: Database) -> Iterator[Finding]:
    if database.engine.dialect.name == "sqlite":
        with database.engine.connect() as connection:
            said = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(5)")]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if said != ["ok"]:
            yield Finding("database_damaged", "sqlite", f"{said[0]}: restore the newest backup.")
        for table, row, referred, _ in broken[:5]:
            message = f"Row {row} refers to a row of {referred} that does not exist."
            yield Finding("reference_broken", str(table), message)
        if journal_mode() != "wal":
            message = "This SQLite can corrupt a write-ahead log: the slower rollback journal is used."
            yield Finding("old_sqlite", "sqlite", message, level="note")
    with database.read() as s:
        since = scrubbing.due(s)
    if since is not None:
        message = "Something was erased, and the files were not written anew since: `perennial scrub`."
        yield Finding("scrub_due", database.engine.dialect.name, message, lambda: scrubbing.scrub(database))
