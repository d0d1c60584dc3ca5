"""The schema and its migrations, and transactions that hold on disk or did not happen."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from service.db import migrate
from service.db.engine import Database, clock, journal_mode
from service.db.tables import Base
from service.errors import Unavailable


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(f"sqlite:///{tmp_path / 'perennial.db'}", busy_seconds=0.05)


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    assert migrate.pending(database)
    migrate.migrate(database)
    assert not migrate.pending(database)
    command.check(migrate.config(database))
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def test_constraints_are_in_the_database_and_not_only_in_the_models(tmp_path: Path) -> None:
    """Alembic does not compare CHECK constraints and partial indexes; the SQL itself does."""

    def schema(database: Database) -> dict[str, str]:
        query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
        with database.read() as s:
            return {name: "".join(sorted(sql.replace('"', "").split())) for name, sql in s.execute(text(query))}

    migrated, made = (Database(f"sqlite:///{tmp_path / name}") for name in ("a.db", "b.db"))
    migrate.migrate(migrated)
    Base.metadata.create_all(made.engine)
    assert schema(migrated).keys() == schema(made).keys()
    for name, sql in schema(made).items():
        assert sorted(schema(migrated)[name].replace(",", "")) == sorted(sql.replace(",", "")), name
    migrated.close()
    made.close()


def test_migrating_again_and_down_is_harmless(database: Database) -> None:
    migrate.migrate(database)
    migrate.migrate(database)
    command.downgrade(migrate.config(database), "base")
    assert migrate.pending(database)
    migrate.migrate(database)
    assert not migrate.pending(database)
    database.close()


def test_sqlite_is_set_up_to_keep_what_it_acknowledged(database: Database) -> None:
    with database.read() as s:
        found = {
            p: s.execute(text(f"PRAGMA {p}")).scalar_one()
            for p in ("synchronous", "foreign_keys", "journal_mode", "secure_delete")
        }
    assert found == {"synchronous": 2, "foreign_keys": 1, "journal_mode": journal_mode(), "secure_delete": 1}
    database.close()


def test_a_block_that_raises_leaves_nothing(database: Database) -> None:
    migrate.migrate(database)

    def add(name: str) -> None:
        with database.write() as s:
            s.execute(text("INSERT INTO tenants VALUES (:n, :n, 0)"), {"n": name})
            if name == "bad":
                raise RuntimeError("no")

    add("good")
    with pytest.raises(RuntimeError):
        add("bad")
    with pytest.raises(IntegrityError):
        add("good")
    with database.read() as s:
        assert list(s.execute(text("SELECT name FROM tenants")).scalars()) == ["good"]
    database.close()


def test_readers_do_not_wait_for_a_writer_and_writers_not_for_ever(database: Database) -> None:
    migrate.migrate(database)
    begun, end = threading.Event(), threading.Event()

    def long_write() -> None:
        with database.write() as s:
            s.execute(text("INSERT INTO tenants VALUES ('a', 'a', 0)"))
            begun.set()
            end.wait(10)

    writer = threading.Thread(target=long_write)
    writer.start()
    assert begun.wait(10)
    with database.read() as s:
        assert s.execute(text("SELECT count(*) FROM tenants")).scalar_one() == 0
    with pytest.raises(Unavailable) as error, database.write():
        pass
    assert error.value.code == "database_unavailable"
    end.set()
    writer.join(10)
    with database.write() as s:
        assert s.execute(text("SELECT count(*) FROM tenants")).scalar_one() == 1
    database.close()


def test_writers_queue_and_each_sees_the_one_before(database: Database) -> None:
    migrate.migrate(database)
    patient = Database(str(database.engine.url), busy_seconds=10)
    with patient.write() as s:
        s.execute(text("INSERT INTO tenants VALUES ('n', '0', 0)"))

    def count_up() -> None:
        for _ in range(10):
            with patient.write() as s:
                n = int(s.execute(text("SELECT name FROM tenants")).scalar_one())
                s.execute(text("UPDATE tenants SET name = :n"), {"n": str(n + 1)})

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with patient.read() as s:
        assert s.execute(text("SELECT name FROM tenants")).scalar_one() == "40"
    patient.close()
    database.close()


def test_the_clock_is_the_databases(database: Database) -> None:
    with database.read() as s:
        assert s.execute(text("SELECT unixepoch('now')")).scalar_one() == pytest.approx(clock(s), abs=1.1)
    database.close()


def test_a_full_disk_is_503_and_what_was_there_stays(database: Database) -> None:
    """`max_page_count` makes SQLite answer as it does on a full disk."""
    migrate.migrate(database)
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with database.write() as s:
        s.execute(text("INSERT INTO tenants VALUES ('a', 'a', 0)"))
    many = [{"n": f"{n}" * 20} for n in range(2000)]
    with pytest.raises(Unavailable), database.write() as s:
        s.execute(text("INSERT INTO tenants VALUES (:n, :n, 0)"), many)
    with database.read() as s:
        assert list(s.execute(text("SELECT id FROM tenants")).scalars()) == ["a"]
    database.close()


def test_a_database_that_is_in_use_is_migrated_without_losing_a_row(database: Database) -> None:
    """Jobs are built anew in SQLite, and rows refer to them."""
    command.upgrade(migrate.config(database), "0003")
    rows = {
        "tenants": {"id": "t", "name": "t", "created_at": 0},
        "adapters": {
            "id": "a", "tenant_id": "t", "name": "n", "base_model": "b", "lora": "{}", "training": "{}", "head_n": 0,
            "live_n": 0, "next_n": 1, "next_seq": 2, "open_jobs": 0, "token": 0, "run_after": 0, "created_at": 0,
        },
        "feedback_batches": {
            "id": "f", "tenant_id": "t", "adapter_id": "a", "body_hash": "x", "training": "{}", "item_count": 1,
            "created_at": 0,
        },
        "jobs": {
            "id": "j", "tenant_id": "t", "adapter_id": "a", "batch_id": "f", "seq": 1, "state": "succeeded",
            "attempts": 0, "version_n": 1, "created_at": 0,
        },
        "applications": {"job_id": "j", "adapter_id": "a", "version_n": 1},
    }  # fmt: skip
    with database.write() as s:
        for table, row in rows.items():
            s.execute(text(f"INSERT INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)})"), row)  # noqa: S608
    for revision in ("head", "0003", "head"):
        (command.downgrade if revision == "0003" else command.upgrade)(migrate.config(database), revision)
        with database.read() as s:
            assert s.execute(text("SELECT job_id FROM applications JOIN jobs ON jobs.id = job_id")).all() == [("j",)]
            assert s.execute(text("PRAGMA foreign_keys")).scalar_one() == 1
    database.close()


def test_an_errors_text_holds_no_values(database: Database) -> None:
    """It goes into a log, and values are what users wrote."""
    migrate.migrate(database)

    def add() -> None:
        with database.write() as s:
            s.execute(text("INSERT INTO tenants VALUES (:n, :n, 0)"), {"n": "what a user wrote"})

    add()
    with pytest.raises(IntegrityError, match="INSERT INTO tenants") as error:
        add()
    assert "what a user wrote" not in str(error.value)
    database.close()


def test_a_rewritten_database_holds_no_byte_of_what_is_in_no_row(database: Database, tmp_path: Path) -> None:
    """Copies that splitting and joining pages leaves are rare: here all of a deleted row is left on purpose."""
    migrate.migrate(database)
    with database.engine.connect().execution_options(begin=None) as connection:
        connection.exec_driver_sql("PRAGMA secure_delete=OFF")
        connection.exec_driver_sql("INSERT INTO tenants VALUES ('gone', 'what a user wrote', 0), ('kept', 'kept', 0)")
        connection.exec_driver_sql("DELETE FROM tenants WHERE id = 'gone'")
        connection.exec_driver_sql("PRAGMA secure_delete=ON")

    def files() -> bytes:
        return b"".join(p.read_bytes() for p in sorted(tmp_path.glob("perennial.db*")))

    assert b"what a user wrote" in files()
    database.rewrite(())
    assert b"what a user wrote" not in files()
    assert b"kept" in files()
    database.close()
