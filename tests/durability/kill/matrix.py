"""Runs of the kill matrix on one stack after another."""

from __future__ import annotations

import logging
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import databases
from demo.client import Client
from service.db.engine import Database
from service.errors import Unavailable
from tests.durability.kill import verdict
from tests.durability.kill.report import Outcome, Run
from tests.durability.kill.stack import LEASE_SECONDS, WORKERS, FaultyStack, running
from tests.durability.kill.traps import ACTIONS, ON_DISK, POINTS, VICTIMS, Plan, Trap, Watch

log = logging.getLogger(__name__)
ADAPTERS = 6
PATIENCE = 120.0
"""Seconds until a run that has not come to its end counts as lost."""
FROZEN_SECONDS = LEASE_SECONDS + 1.5
ADAPTER: dict[str, Any] = {
    "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {"learning_rate": 1e-4, "steps": 10},
}


def plans(runs: int, chance: random.Random) -> list[Plan]:
    """Every cell of the matrix before any comes twice, in random order."""
    cells = [Plan(p, v, a) for p in POINTS for v in VICTIMS for a in ACTIONS]
    found: list[Plan] = []
    while len(found) < runs:
        found += chance.sample(cells, len(cells))
    return found[:runs]


def check(runs: int, seed: int, kinds: Sequence[str]) -> list[Outcome]:
    """`runs` faults in all, shared out among the kinds of database."""
    chance, outcomes = random.Random(seed), []  # noqa: S311 - repeatable, not secret
    todo = plans(runs, chance)
    for n, database in enumerate(kinds):
        share = todo[n :: len(kinds)]
        with (
            tempfile.TemporaryDirectory(prefix="perennial-kill-", ignore_cleanup_errors=True) as place,
            _server(database) as url,
        ):
            watch = Watch()
            with running(Path(place) / "data", url, watch.worker_gate, watch.engine_gate) as stack:
                outcomes.append(Matrix(stack, watch, chance, database).run(share))
    return outcomes


@contextmanager
def _server(database: str) -> Iterator[str | None]:
    """The URL of a fresh database; None for SQLite, which lies in the data directory."""
    if database == "sqlite":
        yield None
    else:
        with databases.fresh(database) as url:
            yield url


class Matrix:
    """All runs on one stack."""

    def __init__(self, stack: FaultyStack, watch: Watch, chance: random.Random, database: str) -> None:
        self._stack, self._watch, self._chance, self._name = stack, watch, chance, database
        self._root = stack.data / "adapters"
        self._database = Database(stack.database_url)
        self._sent: dict[str, str] = {}
        self._timers: list[threading.Timer] = []

    def run(self, todo: Sequence[Plan]) -> Outcome:
        outcome = Outcome()
        with Client(self._stack.url, self._stack.api_key) as client:
            for n in range(ADAPTERS):
                client.call("POST", "/v1/adapters", json={"name": f"a{n}", **ADAPTER})
            for number, plan in enumerate(todo, 1):
                struck, seconds = self._one(plan)
                before, outcome.faults = outcome.faults, verdict.faults(self._database, self._root, self._sent)
                run = Run(self._name, plan, struck, seconds, outcome.faults - before)
                outcome.runs.append(run)
                told = "".join(f", {name}" for name in ([] if struck else ["never"]) + sorted(run.faults))
                log.info("%s %d/%d %s: %.1f s%s", self._name, number, len(todo), plan, seconds, told)
            outcome.faults["unserved"] = self._unserved(client)
        with self._database.read() as s:
            outcome.versions = verdict.rows(s, "SELECT count(*) AS n FROM versions")[0]["n"]
        outcome.acknowledged = len(self._sent)
        self._database.close()
        return outcome

    def _one(self, plan: Plan) -> tuple[bool, float]:
        began = time.monotonic()
        until = began + PATIENCE
        trap = self._watch.trap = Trap(plan, lambda run_id: self._strike(plan, run_id))
        on_disk = None
        if plan.point in ON_DISK:
            known = {str(path) for path in self._root.glob("*/*")}
            arguments = (self._root, known, lambda: self._trainers(signal.SIGSTOP), until)
            on_disk = threading.Thread(target=self._watch.look_at_disk, args=arguments)
            on_disk.start()
        names = [f"a{n}" for n in self._chance.sample(range(ADAPTERS), self._chance.randint(1, 2))]
        for name in names:
            self._send(name)
        while time.monotonic() < until and not (trap.sprung.is_set() and self._settled()):
            self._stack.revive()
            time.sleep(0.1)
            if (
                not trap.sprung.is_set() and self._settled()
            ):  # it trained between two heartbeats: the point was not seen
                self._send(names[0])
        for timer in self._timers:
            timer.join()
        self._timers.clear()
        self._watch.trap = None
        if on_disk is not None:
            trap.sprung.set()
            on_disk.join()
        return trap.struck, time.monotonic() - began

    def _settled(self) -> bool:
        try:
            return verdict.settled(self._database)
        except Unavailable:
            return False

    def _strike(self, plan: Plan, run_id: str | None) -> None:
        part = plan.victim
        if part in ("worker", "trainer"):
            with self._database.read() as s:
                found = verdict.rows(s, "SELECT worker_id FROM runs WHERE id = :id", id=run_id)[0]["worker_id"]
            part = f"trainer of {found}" if plan.victim == "trainer" else found
        self._stack.send(part, plan.action)
        if plan.action is signal.SIGSTOP:
            timer = threading.Timer(FROZEN_SECONDS, self._stack.send, (part, signal.SIGCONT))
            timer.start()
            self._timers.append(timer)
        if plan.point in ON_DISK:  # all were frozen when the moment was seen
            self._trainers(signal.SIGCONT, but=part if plan.action is signal.SIGSTOP else None)

    def _trainers(self, number: signal.Signals, but: str | None = None) -> None:
        for trainer in {f"trainer of {worker}" for worker in WORKERS} - {but}:
            self._stack.send(trainer, number)

    def _send(self, adapter: str) -> None:
        """One batch, said again under its key until it is acknowledged."""
        messages = [{"role": "user", "content": "capital of peru?"}]
        items = [{"messages": messages, "response": "lima.", "feedback": f"end with {self._chance.randrange(99)}"}]
        headers = {
            "authorization": f"Bearer {self._stack.api_key}",
            "idempotency-key": str(self._chance.getrandbits(64)),
        }
        while True:
            with suppress(httpx2.TransportError):
                answer = httpx2.post(
                    f"{self._stack.url}/v1/feedback",
                    json={"adapter": adapter, "items": items},
                    headers=headers,
                    timeout=10,
                )
                if answer.status_code == 202:
                    self._sent[answer.json()["id"]] = adapter
                    return
                assert answer.status_code >= 500, answer.text
            self._stack.revive()
            time.sleep(0.2)

    def _unserved(self, client: Client) -> int:
        """Adapters whose answers do not come from their head."""
        self._stack.wait_ready()
        with self._database.read() as s:
            heads = verdict.rows(s, "SELECT name, head_n FROM adapters")
        return sum(
            client.chat(a["name"], "capital of peru?", max_tokens=2).model != f"{a['name']}@v{a['head_n']}"
            for a in heads
        )
