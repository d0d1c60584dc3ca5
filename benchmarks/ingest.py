"""Feedback in: is exactly what was sent kept, and how fast, against a request that does nothing?

`python -m benchmarks.ingest` (`make check-ingest`) writes build/reports/ingest.json. 10,000 items come from 16 clients;
a tenth are retries after the answer, a tenth are sent by two clients at once, some are sent again because the client
hung up before the answer. The service runs as in production but for some paths more, in the same process, which do
nothing (`benchmarks.ingest_app`): they are asked with the same bodies, in turn with the feedback, and each round gives
one ratio to each. The aim is held against `/noop`, a route of the service's own application that a user would write so.
The clients run in a process of their own, on the same cores; what they compute is in the report.

Beside the rates: the disk's fdatasync in the same directory, since an acknowledged item is on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import func, select

from benchmarks.gateway import MODEL, ROOT, wait_for
from benchmarks.ingest_app import ALONE, BARE, CHECKED, NOOP
from benchmarks.ingest_client import Answered, Sending, load
from benchmarks.pairs import cpu_seconds
from service.db.engine import Database
from service.db.tables import Adapter, Batch, Item, Job, Tenant
from service.local import LocalConfig, LocalStack, free_port
from service.settings import Settings
from service.store import rollouts

REPORT = ROOT / "build" / "reports" / "ingest.json"
AIM = {"ratio": 0.6, "p99_ms": 35.0, "bulk_items_per_s": 4000}
ADAPTERS = 8
BULK = 32
FEEDBACK = "/v1/feedback"
NAMES = {NOOP: "noop", CHECKED: "checked_noop", ALONE: "alone_noop", BARE: "bare_noop"}
"""In the report."""
PATHS = (*NAMES, FEEDBACK)
Json = dict[str, Any]


class Service(LocalStack):
    """The service of the measurement, alone: no worker takes what it is sent."""

    def _commands(self) -> dict[str, list[str]]:
        return super()._commands() | {"service": ["-m", "benchmarks.ingest_app"]}

    @property
    def db_url(self) -> str:
        return self._settings().db_url

    def _settings(self) -> Settings:
        url = self.config.settings.get("PERENNIAL_DATABASE_URL")
        return Settings.model_validate({"data_dir": self.data, "database_url": url})


@dataclass(frozen=True)
class Answers:
    """Stored answers that feedback can name, by adapter."""

    ids: Sequence[str]

    @classmethod
    def stored(cls, service: Service, count: int) -> Answers:
        """Write `count` rollouts, spread over the adapters, as the gateway would have."""
        headers = {"authorization": f"Bearer {service.api_key}"}
        for n in range(ADAPTERS):
            made = httpx2.post(f"{service.url}/v1/adapters", json={"name": f"a{n}"}, headers=headers)
            made.raise_for_status()
        database = Database(service.db_url)
        try:
            return cls([name for at in range(0, count, 500) for name in _store(database, at, min(500, count - at))])
        finally:
            database.close()


def _store(database: Database, at: int, count: int) -> list[str]:
    with database.write() as s:
        tenant = s.scalars(select(Tenant.id)).one()
        adapters = list(s.scalars(select(Adapter.id).order_by(Adapter.name)))
        names = [f"chatcmpl-bench{n:08d}" for n in range(at, at + count)]
        rollouts.add_all(s, [_answer(name, tenant, adapters[n % ADAPTERS]) for n, name in enumerate(names, at)])
    return names


def _answer(name: str, tenant: str, adapter: str) -> rollouts.Answer:
    return rollouts.Answer(
        id=name, tenant_id=tenant, adapter_id=adapter, base_model=MODEL, version_n=0,
        messages=[{"role": "user", "content": "opposite of hot?"}], tools=None, response="cold, of course.", reply=None,
        prompt_token_ids=list(range(100, 164)), response_token_ids=list(range(200, 232)), logprobs=[-0.25] * 32,
        logprobs_mode="raw_logprobs", sampling={"temperature": 1.0}, finish_reason="stop",
    )  # fmt: skip


def single(answer: str, n: int) -> Sending:
    item = {"completion_id": answer, "feedback": f"remark {n}: shorter, please, and end with a question"}
    return Sending(f"single-{n}", json.dumps({"items": [item]}).encode())


def bulk(answers: Sequence[str], n: int) -> Sending:
    """One batch about answers of one adapter."""
    items = [{"completion_id": a, "feedback": f"bulk remark {n}.{i}"} for i, a in enumerate(answers)]
    return Sending(f"bulk-{n}", json.dumps({"items": items}).encode())


def shared_out(sendings: Sequence[Sending], clients: int, chance: random.Random) -> list[list[Sending]]:
    """Shares of the clients. Of ten that are sent, one is a retry, and one the same thing from two clients at once."""
    shares: list[list[Sending]] = [[] for _ in range(clients)]
    for n, sending in enumerate(sendings):
        mine, other = n % clients, (n + 1) % clients
        shares[mine].append(replace(sending, cut=True) if chance.random() < 0.01 else sending)
        if (luck := chance.random()) < 0.125:
            shares[mine].append(sending)
        elif luck < 0.25:
            shares[other].append(sending)
    return shares


def fdatasync_ms(directory: Path, times: int = 200) -> float:
    """Median of so many 4 KB appends with fdatasync, milliseconds."""
    taken = []
    with (directory / "fdatasync.probe").open("wb", buffering=0) as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000


@dataclass
class Record:
    """What was answered, over all rounds."""

    answers: list[Answered]
    rates: dict[str, list[float]]
    """By path, one for each round."""
    cpu_ms: dict[str, list[float]]
    """Of the service, for one request."""
    client_cpu_ms: dict[str, list[float]]

    def ratio(self, path: str) -> float:
        """Of feedback's rate to that of `path`, the median of the rounds."""
        return statistics.median(a / b for a, b in zip(self.rates[FEEDBACK], self.rates[path], strict=True))

    def of(self, path: str, name: str) -> Json:
        """The report's figures of a path; `name` stands before each."""
        return {
            f"{name}rate_per_s": round(statistics.median(self.rates[path])),
            f"{name}cpu_ms_per_request": round(statistics.median(self.cpu_ms[path]), 3),
            f"{name}client_cpu_ms_per_request": round(statistics.median(self.client_cpu_ms[path]), 3),
        }


def measured(service: Service, rounds: Sequence[Sequence[Sequence[Sending]]]) -> Record:
    """Each round to the routes that do nothing, then as feedback."""
    record = Record([], *({p: [] for p in PATHS} for _ in range(3)))
    pid = service.processes["service"].pid
    for shares in rounds:
        for path in PATHS:
            before, own = cpu_seconds(pid), time.process_time()
            answers, seconds = asyncio.run(load(service.url, service.api_key, shares, path))
            record.rates[path].append(len(answers) / seconds)
            record.cpu_ms[path].append((cpu_seconds(pid) - before) / len(answers) * 1000)
            record.client_cpu_ms[path].append((time.process_time() - own) / len(answers) * 1000)
            if path == FEEDBACK:
                record.answers += answers
    return record


def batches_by_key(service: Service) -> dict[str | None, str]:
    """What is stored: Idempotency-Key -> id."""
    database = Database(service.db_url)
    try:
        with database.read() as s:
            return dict(s.execute(select(Batch.idempotency_key, Batch.id)).all())
    finally:
        database.close()


def checked(service: Service, sent: Sequence[Sending], answers: Sequence[Answered]) -> tuple[int, int]:
    """(distinct, stored) items. Raises AssertionError for anything that was lost, doubled, or answered wrongly."""
    assert {a.status for a in answers} == {202}, {a.status for a in answers}
    by_key = {a.key: a.batch_id for a in answers}
    assert all(by_key[a.key] == a.batch_id for a in answers), "one key, two batches"
    distinct = {s.key: len(json.loads(s.body)["items"]) for s in sent}
    kept = batches_by_key(service)
    database = Database(service.db_url)
    try:
        with database.read() as s:
            items = dict(s.execute(select(Item.batch_id, func.count()).group_by(Item.batch_id)).all())
            jobs = s.execute(select(Job.adapter_id, Job.seq).order_by(Job.adapter_id, Job.seq)).all()
    finally:
        database.close()
    assert kept == by_key, "what is stored is not what was acknowledged"
    assert {key: items[batch] for key, batch in kept.items()} == distinct
    for adapter in {a for a, _ in jobs}:
        order = [seq for a, seq in jobs if a == adapter]
        assert order == list(range(1, len(order) + 1)), "the order of an adapter has gaps"
    return sum(distinct.values()), sum(items.values())


@dataclass(frozen=True)
class Size:
    items: int = 10_000
    clients: int = 16
    rounds: int = 5
    bulk_batches: int = 384


def plan(answers: Sequence[str], size: Size, chance: random.Random) -> list[list[list[Sending]]]:
    """Rounds of shares: so many single items in all, retries and duplicates among them."""
    each = size.items // size.rounds * 4 // 5
    numbered = [single(a, n) for n, a in enumerate(answers[: each * size.rounds])]
    return [shared_out(numbered[r * each : (r + 1) * each], size.clients, chance) for r in range(size.rounds)]


def bulk_plan(answers: Sequence[str], size: Size) -> list[Sending]:
    groups = [answers[n::ADAPTERS] for n in range(ADAPTERS)]
    each = [groups[n % ADAPTERS] for n in range(size.bulk_batches)]
    return [bulk([mine[i % len(mine)] for i in range(n, n + BULK)], n) for n, mine in enumerate(each)]


def run(data: Path, engine: str, size: Size, settings: Json) -> Json:
    limits = {"PERENNIAL_ENGINE_URL": engine, "PERENNIAL_MAX_QUEUED_JOBS": str(10 * size.items)}
    service = Service(LocalConfig(data, ROOT / "demo" / "model", MODEL, port=0, settings=limits | settings))
    service.start("service")
    try:
        wait_for(f"{service.url}/healthz")
        sync = fdatasync_ms(data)
        answers = Answers.stored(service, size.items).ids
        rounds = plan(answers, size, random.Random(1))  # noqa: S311 - the same plan each time
        asyncio.run(load(service.url, service.api_key, rounds[0][:4], "/noop"))  # warm
        record = measured(service, rounds)
        batches = bulk_plan(answers, size)
        shares = [batches[c :: size.clients] for c in range(size.clients)]
        bulk_answers, seconds = asyncio.run(load(service.url, service.api_key, shares))
        sent = [s for shares_ in rounds for share in shares_ for s in share]
        distinct, stored = checked(service, [*sent, *batches], [*record.answers, *bulk_answers])
    finally:
        service.stop()
    bulk_items = size.bulk_batches * BULK
    taken = sorted(a.seconds * 1000 for a in record.answers)
    return {
        "items": len(sent),
        "distinct": distinct - bulk_items,
        "stored": stored - bulk_items,
        **record.of(FEEDBACK, ""),
        **{k: v for path, name in NAMES.items() for k, v in record.of(path, f"{name}_").items()},
        "ratio": round(record.ratio(NOOP), 3),
        **{f"ratio_to_{name}": round(record.ratio(path), 3) for path, name in NAMES.items() if path != NOOP},
        "p50_ms": round(statistics.median(taken), 2),
        "p99_ms": round(statistics.quantiles(taken, n=100)[98], 2),
        "bulk_items_per_s": round(bulk_items / seconds),
        "fdatasync_ms_p50": round(sync, 3),
    }


@contextmanager
def synthetic_engine() -> Iterator[str]:
    """URL of an engine that is asked for its window alone."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.sse_engine", str(port)], cwd=ROOT)  # noqa: S603
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Feedback in: exactness, rate and latency against a no-op.")
    parser.add_argument("--items", type=int, default=Size.items)
    parser.add_argument("--clients", type=int, default=Size.clients)
    parser.add_argument("--database-url", help="measure on this empty database instead of SQLite")
    options = parser.parse_args()
    size = Size(options.items, options.clients)
    settings = {"PERENNIAL_DATABASE_URL": options.database_url} if options.database_url else {}
    with synthetic_engine() as engine, tempfile.TemporaryDirectory() as data:
        report = run(Path(data), engine, size, settings)
    report |= {"aim": AIM, "clients": size.clients, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
