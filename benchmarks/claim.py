"""How long a claim takes with 1,000, 10,000 and 100,000 jobs queued over 1,000 adapters, and who gets the turns.

`python -m benchmarks.claim` (`make check-claim`) writes build/reports/claim.json, for SQLite and for PostgreSQL.
Timed is the service's own transaction, from its begin to its commit on disk; every claimed run is committed like a
worker's, so that the next claim meets the queue as it would be. Half of the adapters belong to one tenant of twenty:
with fair turns each tenant gets one claim in twenty as long as it has work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text

from api_schemas.training import TrainingSettings, resolve
from api_schemas.worker import CommitRequest, FileEntry, Lease, LeaseRequest
from benchmarks.databases import KINDS, fresh
from service.db import migrate
from service.db.engine import Database
from service.db.tables import Adapter, Batch, Item, Job, Tenant
from service.store import leases
from service.store.rules import Rules

REPORT = Path(__file__).parents[1] / "build" / "reports" / "claim.json"
BASE = "base"
Json = dict[str, Any]


@dataclass(frozen=True)
class Backlog:
    jobs: int
    adapters: int
    tenants: int

    def tenant_of(self, adapter: int) -> int:
        """Every second adapter is the first tenant's; the others are spread over the rest."""
        return 0 if adapter % 2 == 0 else 1 + (adapter // 2) % (self.tenants - 1)


def fill(database: Database, backlog: Backlog) -> None:
    """Queue the jobs, an item each, adapter after adapter in turn."""
    training = resolve(TrainingSettings()).model_dump()
    for table, rows in (
        (Tenant, ({"id": f"t{n}", "name": f"t{n}", "created_at": 0.0} for n in range(backlog.tenants))),
        (Adapter, adapters(backlog)),
        (Batch, (batch(backlog, n, training) for n in range(backlog.jobs))),
        (Item, (item(n) for n in range(backlog.jobs))),
        (Job, (job(backlog, n) for n in range(backlog.jobs))),
    ):
        with database.write() as s:
            while part := list(islice(rows, 2000)):
                s.execute(insert(table), part)
    if database.engine.dialect.name == "postgresql":
        with database.write() as s:
            s.execute(text("ANALYZE"))


def adapters(backlog: Backlog) -> Iterator[Json]:
    for n in range(backlog.adapters):
        queued = len(range(n, backlog.jobs, backlog.adapters))
        yield {
            "id": f"a{n}", "tenant_id": f"t{backlog.tenant_of(n)}", "name": f"a{n}", "base_model": BASE,
            "lora": {"rank": 8, "alpha": 16}, "training": {}, "created_at": 0.0, "waits_since": float(n),
            "next_seq": queued + 1, "open_jobs": queued,
        }  # fmt: skip


def batch(backlog: Backlog, n: int, training: Json) -> Json:
    adapter = n % backlog.adapters
    return {
        "id": f"b{n}", "tenant_id": f"t{backlog.tenant_of(adapter)}", "adapter_id": f"a{adapter}", "body_hash": "x",
        "training": training, "item_count": 1, "created_at": float(n),
    }  # fmt: skip


def item(n: int) -> Json:
    messages = [{"role": "user", "content": "name a fruit"}]
    return {
        "id": f"i{n}", "batch_id": f"b{n}", "position": 0, "messages": messages, "response": "a pear",
        "feedback": "shorter", "standing": True,
    }  # fmt: skip


def job(backlog: Backlog, n: int) -> Json:
    adapter = n % backlog.adapters
    return {
        "id": f"j{n}", "tenant_id": f"t{backlog.tenant_of(adapter)}", "adapter_id": f"a{adapter}", "batch_id": f"b{n}",
        "seq": n // backlog.adapters + 1, "created_at": float(n),
    }  # fmt: skip


def work(database: Database, claims: int, rules: Rules) -> Iterator[tuple[float, float, Lease]]:
    """Claim and commit; seconds of wall and of our own computing time for each claim, with its lease."""
    request = LeaseRequest(worker_id="w", base_model=BASE)
    for _ in range(claims):
        began, computing = time.perf_counter(), time.process_time()
        with database.write() as s:
            lease = leases.claim(s, request, rules)
        took, computed = time.perf_counter() - began, time.process_time() - computing
        if lease is None:
            return
        done = CommitRequest(
            token=lease.token, uri=f"{lease.adapter_id}/{lease.run_id}",
            files=[FileEntry(name=f"adapter/{part}", size=1, sha256="0" * 64) for part in "ab"],
            standing_feedback=[], metrics=[], training_seconds=0.0,
        )  # fmt: skip
        with database.write() as s:
            leases.commit(s, lease.run_id, done, digest="sha256:0", size_bytes=2)
        yield took, computed, lease


def measured(kind: str, backlog: Backlog, claims: int, coalesce_items: int = 1) -> Json:
    """Claim times, milliseconds, and the share of the claims that each tenant got, largest and smallest."""
    with fresh(kind) as url:
        database = Database(url)
        migrate.migrate(database)
        fill(database, backlog)
        done = list(work(database, claims, Rules(coalesce_items=coalesce_items)))
        database.close()
    took, computed = ([1000 * row[column] for row in done] for column in (0, 1))
    tenants = Counter(backlog.tenant_of(int(lease.adapter_id[1:])) for _, _, lease in done)
    shares = [tenants[t] / len(done) for t in range(backlog.tenants)]
    return {
        "jobs": backlog.jobs,
        "adapters": backlog.adapters,
        "coalesce_items": coalesce_items,
        "claims": len(done),
        "claim_ms_p50": round(statistics.median(took), 3),
        "claim_ms_p99": round(statistics.quantiles(took, n=100)[98], 3),
        "claim_cpu_ms_p50": round(statistics.median(computed), 3),
        "busiest_tenant_share_of_adapters": 0.5,
        "largest_share": round(max(shares), 4),
        "smallest_share": round(min(shares), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Claim time and fairness under a backlog.")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--claims", type=int, default=400)
    options = parser.parse_args()
    report: Json = {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    for kind in KINDS:
        plans = [(jobs, 1) for jobs in options.jobs] + [(options.jobs[-1], 16)]
        report[kind] = [measured(kind, Backlog(j, options.adapters, 20), options.claims, c) for j, c in plans]
        for row in report[kind]:
            print(kind, json.dumps(row))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
