"""Two real service processes on one database: any of them serves, one publishes, and another does when it is gone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from benchmarks.databases import KINDS, fresh
from service import context as contexts
from service.context import Context
from service.db import migrate
from service.settings import Settings
from service.store.keys import CLIENT_SCOPES, WORKER_SCOPES
from tests.service import peft_files
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Worker
from tests.service.processes import ServiceProcess, listening, wait_for

pytestmark = pytest.mark.slow
LEASE = 2.0


@dataclass
class Pair:
    services: list[ServiceProcess]
    engine: FakeEngine
    context: Context
    key: str
    worker_key: str

    def rows(self, statement: str) -> list[Any]:
        with self.context.database.read() as s:
            return list(s.execute(text(statement)))

    @property
    def term(self) -> tuple[int, int]:
        """Process id of the publisher, and its fencing token."""
        [(holder, token)] = self.rows("SELECT holder, token FROM leaders WHERE until > 0") or [("--0-", 0)]
        return int(holder.split("-")[-2] or 0), token

    def leader(self) -> ServiceProcess:
        wait_for("a publisher", lambda: self.term[0] in [s.pid for s in self.services])
        return next(s for s in self.services if s.pid == self.term[0])

    def learn(self, through: ServiceProcess, n: int) -> None:
        """Version `n` is trained through this process, and served by it."""
        worker = Worker(through.caller(self.worker_key), self.context.settings.adapters_root)
        through.caller(self.key).feedback(f"remark {n}")
        assert worker.train() == n
        self.serves(through, n)

    def serves(self, service: ServiceProcess, n: int) -> None:
        caller = service.caller(self.key)
        wait_for(f"version {n}", lambda: caller.chat()["model"] == f"helper@v{n}")
        assert caller.says("helper").endswith(f"-v{n}")


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path, model_dir: Path) -> Iterator[Pair]:
    engine = FakeEngine(peft_files.BASE)
    with ExitStack() as stack:
        settings: dict[str, Any] = {
            "data_dir": tmp_path,
            "database_url": stack.enter_context(fresh(request.param)),
            "model_dir": model_dir,
            "base_model": peft_files.BASE,
            "engine_url": stack.enter_context(listening(engine)),
            "publisher_lease_seconds": LEASE,
            "reconcile_seconds": 0.2,
            "drain_seconds": 0.2,
            "canary": False,
        }
        context = contexts.build(Settings.model_validate(settings))
        stack.callback(context.database.close)
        migrate.migrate(context.database)
        with context.database.write() as s:
            key = context.keys.create(s, tenant="alice", name="test", scopes=CLIENT_SCOPES)
            worker = context.keys.create(s, tenant=None, name="test", scopes=WORKER_SCOPES)
        services = [ServiceProcess(settings, tmp_path / f"{n}.log") for n in "ab"]
        for service in services:
            stack.callback(service.end)
        for service in services:
            wait_for("the service", service.answers)
        yield Pair(services, engine, context, key, worker)


def test_another_process_publishes_when_the_publisher_is_frozen_or_killed(pair: Pair) -> None:
    first = pair.leader()
    second = next(s for s in pair.services if s is not first)
    second.caller(pair.key).create()
    pair.learn(second, 1)
    pair.serves(first, 1)
    token = pair.term[1]

    with pair.context.database.write():  # SQLite has one lock, and whoever is frozen with it keeps it
        first.freeze()
    pair.learn(second, 2)
    assert pair.term == (second.pid, token + 1)
    first.signal(signal.SIGCONT)
    pair.serves(first, 2)
    pair.learn(first, 3)
    assert pair.term == (second.pid, token + 1), "who wakes up has lost the office"

    second.signal(signal.SIGKILL)
    pair.learn(first, 4)
    assert pair.term == (first.pid, token + 2)
    wait_for("one version in the engine", lambda: len(pair.engine.adapters) == 1)
    published = pair.rows("SELECT version_n FROM events WHERE type = 'version.published' ORDER BY n")
    assert published == [(1,), (2,), (3,), (4,)]


def test_a_process_that_stops_gives_the_office_back(pair: Pair) -> None:
    first = pair.leader()
    first.signal(signal.SIGTERM)
    first.process.wait(60)
    assert pair.term[0] != first.pid


def test_a_version_that_another_process_answers_with_is_not_unloaded(pair: Pair) -> None:
    first = pair.leader()
    second = next(s for s in pair.services if s is not first)
    caller = second.caller(pair.key)
    caller.create()
    pair.learn(second, 1)
    pair.learn(second, 2)
    wait_for("the old one unloaded", lambda: len(pair.engine.adapters) == 1)
    old = f"{caller.adapter()['id']}-v1"
    # Asked for by name again and again, through the process that does not publish.
    for _ in range(20):
        assert caller.says("helper@v1").endswith("-v1")
    unloads = [e for e in pair.engine.events if e == ("unload", old)]
    assert len(unloads) <= 2
    wait_for("it unloaded once nobody asks", lambda: old not in pair.engine.adapters)
