"""The same service on a real PostgreSQL: schema, leases, idempotency, versions and the loop, test for test."""

# ruff: noqa: F403

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from benchmarks.databases import admin, postgresql_server, url_of
from service.db import migrate
from service.db.engine import Database, clock
from service.db.tables import Job, Leader
from service.errors import Unavailable
from service.store import adapters, election, jobs
from tests.service.harness import Stack
from tests.service.test_idempotency import *
from tests.service.test_ingest import *
from tests.service.test_job_events import *
from tests.service.test_leases import *
from tests.service.test_loop import *
from tests.service.test_prepared import *
from tests.service.test_preview import *
from tests.service.test_queue import *
from tests.service.test_versions import *
from tests.service.test_webhooks import *

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server of our own; ends with the module."""
    with postgresql_server() as found:
        yield found


@pytest.fixture(scope="module")
def template(server: Any) -> str:
    """A migrated database, to be copied."""
    admin(server, "CREATE DATABASE template")
    database = Database(url_of(server, "template"))
    assert migrate.pending(database)
    migrate.migrate(database)
    assert not migrate.pending(database)
    database.close()
    return "template"


@pytest.fixture
def database_url(server: Any, template: str, tmp_path: Path) -> Iterator[str]:
    """A fresh database for one test."""
    name = f"t{abs(hash(tmp_path))}"
    admin(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield url_of(server, name)
    admin(server, f"DROP DATABASE {name} WITH (FORCE)")


def test_it_is_postgresql_and_its_clock_goes_on_within_a_transaction(stack: Stack) -> None:
    database = stack.context.database
    assert database.engine.dialect.name == "postgresql"
    with database.write() as s:
        first = clock(s)
        s.execute(text("SELECT pg_sleep(0.01)"))
        assert clock(s) > first + 0.009


def test_connections_that_the_server_ended_are_replaced(stack: Stack, server: Any) -> None:
    stack.alice.create()
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 't%' AND state = 'idle'"
    assert admin(server, ended) > 0
    assert stack.alice.adapter()["name"] == "helper"


def test_an_adapter_whose_row_is_held_for_a_moment_is_passed_over_and_keeps_its_place(stack: Stack) -> None:
    for name in ("first", "second", "third"):
        stack.alice.create(name)
        stack.alice.feedback(adapter=name)
    with stack.context.database.write() as s:  # as the publisher does, or feedback that comes in
        s.execute(text("SET LOCAL idle_in_transaction_session_timeout = '30s'"))  # a claim that waits for us ends
        adapters.locked(s, stack.alice.adapter("first")["id"])
        assert stack.worker.must_lease().adapter == "second"
    assert stack.worker.must_lease().adapter == "first"


def test_who_freezes_amid_a_transaction_loses_it(server: Any, database_url: str) -> None:
    def outlived(frozen: Database, other: Database) -> None:
        with frozen.write() as s:
            election.stand(s, "publisher", "frozen", 60.0)
            with other.write() as t:
                assert election.stand(t, "publisher", "other", 60.0) == 1
            s.execute(text("SELECT 1"))

    with closing(Database(database_url, busy_seconds=0.2)) as frozen, closing(Database(database_url)) as other:
        with pytest.raises(Unavailable):
            outlived(frozen, other)
        with other.read() as s:
            assert s.scalars(select(Leader.holder)).all() == ["other"]


def test_a_claim_that_waited_for_a_cancellation_does_not_bring_the_job_back(stack: Stack) -> None:
    stack.alice.create()
    first, second = stack.alice.feedback("one"), stack.alice.feedback("two")
    database, found = stack.context.database, []
    claiming = threading.Thread(target=lambda: found.append(stack.worker.lease()))
    with database.write() as s:
        jobs.cancel(s, s.get_one(Job, first["job_id"]))
        s.flush()
        claiming.start()
        waiting = "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        until = time.monotonic() + 20
        while stack.rows(waiting)[0]["n"] == 0:
            assert time.monotonic() < until
    claiming.join(20)
    assert stack.alice.job(first["job_id"])["status"] == "cancelled"
    lease = found[0] or stack.worker.must_lease()
    assert [i.feedback for i in lease.items] == ["two"]
    assert stack.alice.job(second["job_id"])["status"] == "running"
