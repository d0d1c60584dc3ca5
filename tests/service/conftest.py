from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service import context as contexts
from service.app import create_app
from service.context import Context
from service.db import migrate
from service.db.engine import Database
from service.settings import Settings
from service.store.keys import CLIENT_SCOPES, WORKER_SCOPES
from tests.service import peft_files
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Caller, Stack, Worker

PATIENT = {
    "reconcile_seconds": 3600.0,
    "drain_seconds": 0.0,
    "retry_backoff": 0.0,
    "coalesce_items": 1,
    "publisher_lease_seconds": 3600.0,
    "lease_seconds": 3600.0,
}
"""The publisher passes when rung or told to, and leases end when a test says so, never by the clock; each batch is
trained alone unless a test says so."""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_files.base_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, to be copied."""
    path = tmp_path_factory.mktemp("database") / "perennial.db"
    database = Database(f"sqlite:///{path}")
    migrate.migrate(database)
    database.close()
    return path


@pytest.fixture
def database_url() -> str | None:
    """None: SQLite in the data directory. A module that overrides it runs the same tests on another database."""
    return None


@pytest.fixture
def make_context(
    tmp_path: Path, model_dir: Path, empty_database: Path, database_url: str | None
) -> Iterator[Callable[..., tuple[Context, FakeEngine]]]:
    """A context on a fresh database and a fresh engine; settings can be changed by name."""

    opened = ExitStack()

    def make(engine: FakeEngine | None = None, **changes: Any) -> tuple[Context, FakeEngine]:
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        if not (data / "perennial.db").exists():
            shutil.copy(empty_database, data / "perennial.db")
        values = {"data_dir": data, "database_url": database_url, "model_dir": model_dir, "base_model": peft_files.BASE}
        values |= PATIENT | changes
        engine = engine or FakeEngine(peft_files.BASE)
        context = contexts.build(Settings.model_validate(values), transport=engine)
        opened.callback(context.database.close)
        return context, engine

    with opened:
        yield make


@pytest.fixture
def make_stack(make_context: Callable[..., tuple[Context, FakeEngine]]) -> Iterator[Callable[..., Stack]]:
    """A running service. Called again in one test, it is the service started anew on the same data."""

    @contextmanager
    def running(engine: FakeEngine | None, changes: dict[str, Any]) -> Iterator[Stack]:
        context, engine = make_context(engine, **changes)
        with context.database.write() as s:
            alice, bob = (context.keys.create(s, tenant=t, name="test", scopes=CLIENT_SCOPES) for t in ("alice", "bob"))
            worker = context.keys.create(s, tenant=None, name="test", scopes=WORKER_SCOPES)
        with TestClient(create_app(context), raise_server_exceptions=False) as client:
            settings = context.settings
            root = settings.data_dir.parent / "worker" if context.storage.remote else settings.adapters_root
            callers = (Caller(client, alice), Caller(client, bob), Worker(Caller(client, worker), root))
            yield Stack(context, engine, client, *callers)

    with ExitStack() as stacks:
        yield lambda engine=None, **changes: stacks.enter_context(running(engine, changes))


@pytest.fixture
def stack(make_stack: Callable[..., Stack]) -> Stack:
    return make_stack()


@pytest.fixture
def helper(stack: Stack) -> Stack:
    """A service where alice has an adapter named helper."""
    stack.alice.create()
    return stack


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
