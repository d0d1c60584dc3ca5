"""Steps of the lease protocol that several tests take."""

from __future__ import annotations

from api_schemas.worker import Lease
from tests.service import peft_files
from tests.service.harness import Json, Stack, Worker, error_of


def expire(stack: Stack) -> None:
    """The lease runs out, by the only clock that counts."""
    stack.sql("UPDATE adapters SET lease_until = 1.0 WHERE lease_until IS NOT NULL")


def state(stack: Stack) -> list[Json]:
    """All that a fenced call must not change."""
    tables = {
        "adapters": "head_n, live_n, next_n, next_seq, open_jobs, token, lease_run, lease_until",
        "jobs": "state, attempts, error, version_n, run_id",
        "runs": "state, progress",
        "versions": "n",
        "applications": "job_id",
        "run_steps": "step",
    }
    queries = [f"SELECT {columns} FROM {table} ORDER BY 1" for table, columns in tables.items()]  # noqa: S608
    return [dict(row) for query in queries for row in stack.rows(query)]


def call(worker: Worker, lease: Lease, verb: str) -> int:
    extra: dict[str, Json] = {
        "heartbeat": {"metrics": [{"step": 9, "loss": 1.0}], "progress": {"phase": "x"}},
        "fail": {"error": {"code": "x", "message": "y"}, "retryable": False},
        "release": {},
        "commit": {},
    }
    if verb == "commit":
        directory = worker.root / lease.adapter_id / lease.run_id
        if not directory.exists():
            peft_files.write_version(worker.root, lease)
        answer = worker.commit(lease, peft_files.manifest(directory))
    else:
        answer = worker.call(lease, verb, **extra[verb])
    if answer.status_code == 409:
        assert error_of(answer, 409, "lease_lost")
        assert answer.headers["x-should-retry"] == "false"
    return answer.status_code


def lease_again(stack: Stack) -> Json:
    expire(stack)
    return stack.worker.must_lease().model_dump()
