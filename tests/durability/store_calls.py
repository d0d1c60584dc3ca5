"""The store's own functions, in the few calls that these checks make of them. No logic: arguments are filled in."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

import api_schemas.worker as worker_wire
from api_schemas.adapters import AdapterCreate
from api_schemas.feedback import FeedbackRequest
from api_schemas.jobs import JobError
from service import admission
from service.db.tables import Adapter, Batch, Job, Version
from service.store import adapters, feedback, jobs, keys, leases, retries, versions
from service.store.acceptance import Accepted, Submission, accept
from service.store.rules import Rules
from service.store.waiting import Limits

BASE = "base"
RULES = Rules(lease_seconds=1e6, max_attempts=3, backoff=0.0, coalesce_items=2)
"""A lease ends when `expire` says so, not by the clock; a failed job may be tried again at once."""
FILES = [
    worker_wire.FileEntry(name="adapter/adapter_config.json", size=2, sha256="0" * 64),
    worker_wire.FileEntry(name="adapter/adapter_model.safetensors", size=8, sha256="1" * 64),
]


def tenant(s: Session, name: str = "alice") -> str:
    return keys.tenant_id(s, name)


def create_adapter(s: Session, tenant_id: str, name: str) -> Adapter:
    return adapters.create(s, tenant_id, AdapterCreate(name=name), BASE, limit=1000)


def submit(
    s: Session, tenant_id: str, adapter: str, key: str | None, *, items: int = 1, text: str = "a pear"
) -> tuple[Batch, bool]:
    item = {"messages": [{"role": "user", "content": "name a fruit"}], "response": text, "feedback": "shorter"}
    request = FeedbackRequest.model_validate({"adapter": adapter, "items": [item] * items})
    sent = Submission(tenant_id, request, key, feedback.digest(feedback.meaning(request)), bounds=())
    (outcome,) = accept(s, [sent], Limits(1000, 1000, 1000))
    if not isinstance(outcome, Accepted):
        raise AssertionError(outcome)
    return s.get_one(Batch, outcome.view.id), outcome.replayed


def claim(s: Session, worker: str) -> worker_wire.Lease | None:
    return leases.claim(s, worker_wire.LeaseRequest(worker_id=worker, base_model=BASE), RULES)


def heartbeat(s: Session, run_id: str, token: int, step: int = 0) -> None:
    beat = worker_wire.Heartbeat.model_validate({"token": token, "metrics": [{"step": step, "loss": 1.0}]})
    leases.heartbeat(s, run_id, beat, RULES.lease_seconds)


def commit(s: Session, run_id: str, token: int, adapter_id: str) -> Version:
    request = worker_wire.CommitRequest(
        token=token, uri=f"{adapter_id}/{run_id}", files=FILES, standing_feedback=[], metrics=[], training_seconds=1.0
    )
    return leases.commit(s, run_id, request, digest=admission.version_digest(FILES), size_bytes=10)


def fail(s: Session, run_id: str, token: int, *, retryable: bool) -> None:
    error = JobError(code="out_of_memory", message="no")
    request = worker_wire.FailRequest(token=token, error=error, retryable=retryable)
    leases.fail(s, run_id, request, RULES)


def release(s: Session, run_id: str, token: int) -> None:
    leases.release(s, run_id, token)


def cancel(s: Session, job_id: str) -> None:
    jobs.cancel(s, s.get_one(Job, job_id))


def requeue(s: Session, job_id: str) -> None:
    retries.requeue(s, s.get_one(Job, job_id))


def expire(s: Session) -> None:
    """Time passes: every lease that is held runs out."""
    s.execute(update(Adapter).where(Adapter.lease_until.is_not(None)).values(lease_until=1.0))


def publish(s: Session, adapter_id: str, n: int) -> None:
    """As service.serving.publisher moves the alias, once an engine has loaded version `n`."""
    adapter = adapters.locked(s, adapter_id)
    if adapter.head_n == n and adapter.live_n != n and adapter.deleted_at is None:
        adapters.set_live(s, adapter, n)


def reject(s: Session, adapter_id: str, n: int) -> None:
    versions.reject(s, adapter_id, n, "the engine refused it")


def promote(s: Session, adapter_id: str, n: int) -> None:
    adapter = s.get_one(Adapter, adapter_id)
    if n:
        versions.servable(s, adapter, n)
    adapters.promote(s, adapter, n)


def delete_adapter(s: Session, adapter_id: str) -> None:
    adapters.delete(s, s.get_one(Adapter, adapter_id))


def plain(value: Any) -> tuple[str, int, str]:
    """Of a lease: run, token, adapter."""
    return value.run_id, value.token, value.adapter_id
