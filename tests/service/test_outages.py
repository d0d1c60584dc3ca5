"""The database dies, is slow or full in the middle of things: clear errors meanwhile, nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import httpx2
import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from api_schemas.worker import Lease
from benchmarks.databases import admin, postgresql_server, url_of
from service.db import migrate
from service.db.engine import Database
from tests.service import peft_files
from tests.service.harness import Stack, batch, error_of
from tests.service.wire import Wire, wired

pytestmark = pytest.mark.slow
PATIENCE = 60.0
MakeStack = Callable[..., Stack]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """PostgreSQL with a migrated database `template`."""
    with postgresql_server() as found:
        admin(found, "CREATE DATABASE template")
        database = Database(url_of(found, "template"))
        migrate.migrate(database)
        database.close()
        # Before it recovers it syncs its whole directory, file by file unless told otherwise: seconds on a busy disk.
        admin(found, "ALTER SYSTEM SET recovery_init_sync_method = syncfs")
        yield found
        crash(found)  # nothing of it is kept: no last checkpoint


@pytest.fixture
def wire(server: Any) -> Iterator[Wire]:
    with wired(Path(make_url(server.get_uri()).query["host"]) / ".s.PGSQL.5432") as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture
def postgres(server: Any, wire: Wire, make_stack: MakeStack, tmp_path: Path) -> Stack:
    """A service whose PostgreSQL is behind the wire, with alice's adapter `helper`."""
    name = f"t{abs(hash(tmp_path))}"
    admin(server, f"CREATE DATABASE {name} TEMPLATE template")
    url = f"postgresql+psycopg://postgres@127.0.0.1:{wire.port}/{name}?sslmode=disable&gssencmode=disable"
    stack = make_stack(database_url=url)
    stack.alice.create()
    return stack


def crash(server: Any) -> None:
    """PostgreSQL's `immediate` shutdown: no checkpoint, every connection cut. The next start recovers from its log."""
    process = server.get_postmaster_info().process
    os.kill(server.get_pid(), signal.SIGQUIT)
    process.wait(PATIENCE)


def restart(server: Any) -> None:
    """Until it takes connections again: the package's own start gives up on a recovery after ten seconds."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            server.ensure_postgres_running()
            admin(server, "SELECT 1")
            return
        except (SubprocessError, DBAPIError):
            assert time.monotonic() < until


def unavailable(answer: httpx2.Response) -> None:
    error_of(answer, 503, "database_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def effects(stack: Stack) -> tuple[int, int, int]:
    return stack.count("versions"), stack.count("applications"), stack.count("feedback_batches")


@contextmanager
def dies_within(server: Any, stack: Stack, call: Callable[[], httpx2.Response]) -> Iterator[None]:
    """`call` begins; its transaction waits for the rows of the jobs, which it is about to change; PostgreSQL dies. The
    block runs while it is gone."""
    answers: list[httpx2.Response] = []
    calling = threading.Thread(target=lambda: answers.append(call()))
    outside = create_engine(url_of(server, stack.context.database.engine.url.database or ""))
    with suppress(DBAPIError), outside.connect() as holder:
        holder.execute(text("SELECT id FROM jobs FOR UPDATE"))
        calling.start()
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        until = time.monotonic() + PATIENCE
        while not holder.execute(waiting).scalar_one():
            holder.execute(text("SELECT pg_stat_clear_snapshot()"))
            assert time.monotonic() < until
        crash(server)
    outside.dispose()
    calling.join(PATIENCE)
    unavailable(answers[0])
    yield
    restart(server)


def test_postgresql_dies_during_a_claim(server: Any, postgres: Stack) -> None:
    sent = postgres.alice.feedback()
    body = {"worker_id": "worker-1", "base_model": peft_files.BASE}
    with dies_within(server, postgres, lambda: postgres.worker.caller.post("/worker/v1/leases", body)):
        unavailable(postgres.alice.post("/v1/feedback", batch("lost? no: refused")))
        unavailable(postgres.alice.get("/v1/adapters"))
    assert postgres.count("runs") == 0
    lease = postgres.worker.must_lease()
    assert (lease.token, postgres.alice.job(sent["job_id"])["attempts"]) == (1, 0)
    assert postgres.worker.train(lease) == 1
    postgres.converge()
    assert postgres.alice.chat()["model"] == "helper@v1"
    assert effects(postgres) == (1, 1, 1)


def test_postgresql_dies_during_training(server: Any, postgres: Stack) -> None:
    sent = [postgres.alice.feedback(remark, key=remark) for remark in ("one", "two")]
    lease = postgres.worker.must_lease()
    crash(server)
    unavailable(postgres.worker.call(lease, "heartbeat"))
    unavailable(postgres.alice.post("/v1/feedback", batch("three"), headers={"idempotency-key": "three"}))
    restart(server)
    assert postgres.worker.call(lease, "heartbeat").status_code == 200, "the lease has outlived the outage"
    assert [postgres.alice.feedback(remark, key=remark)["id"] for remark in ("one", "two")] == [b["id"] for b in sent]
    postgres.alice.feedback("three", key="three")
    assert [postgres.worker.train(lease), postgres.worker.train(), postgres.worker.train()] == [1, 2, 3]
    assert [postgres.alice.job(b["job_id"])["attempts"] for b in sent] == [0, 0]
    assert effects(postgres) == (3, 3, 3)


def test_postgresql_dies_during_a_commit(server: Any, postgres: Stack) -> None:
    sent = postgres.alice.feedback()
    lease, commit = ready_to_commit(postgres)
    with dies_within(server, postgres, commit):
        unavailable(commit())
    assert effects(postgres) == (0, 0, 1)
    assert commit().json()["version"] == 1
    assert postgres.worker.call(lease, "heartbeat").status_code == 409
    assert effects(postgres) == (1, 1, 1)
    assert postgres.alice.job(sent["job_id"])["status"] == "succeeded"


def test_the_answer_to_a_commit_is_lost_on_the_wire(postgres: Stack, wire: Wire) -> None:
    """The transaction is in the database, and the service hears nothing of it."""
    postgres.alice.feedback()
    _, commit = ready_to_commit(postgres)
    wire.cut_after = b"INSERT INTO applications"
    unavailable(commit())
    assert effects(postgres) == (0, 0, 1)

    @event.listens_for(postgres.context.database.engine, "commit", once=True)
    def cut(_connection: object) -> None:
        wire.cut_after = b"COMMIT"

    unavailable(commit())
    assert wire.cut_after is None
    assert effects(postgres) == (1, 1, 1)
    assert commit().json()["version"] == 1
    assert effects(postgres) == (1, 1, 1)


def ready_to_commit(stack: Stack, **fields: Any) -> tuple[Lease, Callable[[], httpx2.Response]]:
    """A lease whose version is written, and the call that commits it."""
    lease = stack.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(stack.root, lease))
    return lease, lambda: stack.worker.commit(lease, files, **fields)


def test_a_database_200_ms_away_is_slow_and_no_more(postgres: Stack, wire: Wire) -> None:
    wire.delay = 0.1
    began = time.monotonic()
    sent = postgres.alice.feedback()
    assert postgres.worker.train() == 1
    assert time.monotonic() - began > 5, "the wire delays"
    wire.delay = 0.0
    postgres.converge()
    assert postgres.alice.chat()["model"] == "helper@v1"
    assert postgres.alice.job(sent["job_id"])["attempts"] == 0
    assert effects(postgres) == (1, 1, 1)


def test_the_databases_disk_is_full_during_a_commit(make_stack: MakeStack) -> None:
    """SQLite with `max_page_count` answers as it does on a full disk."""
    stack = make_stack()
    stack.alice.create()
    sent = stack.alice.feedback()
    steps = [{"step": n, "loss": 0.5} for n in range(1, 1001)]  # more than fits into pages that are there
    _, commit = ready_to_commit(stack, metrics=steps)
    engine, full = stack.context.database.engine, [True]

    @event.listens_for(engine, "checkout")
    def limited(connection: Any, _record: object, _proxy: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {1 if full[0] else 2**30}")  # 1: the pages that there are

    unavailable(commit())
    assert effects(stack) == (0, 0, 1)
    assert stack.alice.job(sent["job_id"])["status"] == "running"
    full[0] = False
    assert commit().json()["version"] == 1
    assert effects(stack) == (1, 1, 1)


def test_files_dated_by_a_clock_that_is_wrong_are_not_taken_for_garbage(make_stack: MakeStack) -> None:
    """A worker two hours behind writes to a shared directory: what a run under way has written stays."""
    stack = make_stack()
    stack.alice.create()
    stack.alice.feedback()
    lease, commit = ready_to_commit(stack)
    directory = stack.root / lease.adapter_id / lease.run_id
    behind = time.time() - 7200
    for path in (*directory.rglob("*"), directory):
        os.utime(path, (behind, behind))
    stack.converge()
    assert commit().json()["version"] == 1
