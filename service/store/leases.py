"""The lease protocol: claim, heartbeat, commit, answer, fail, release.

The adapter's row is the mutex, its `token` the fencing token: every claim raises it, and every later call must show it.
A lease alone is not safe, since a frozen process wakes up; the token check in the committing transaction is.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

import api_schemas.worker as wire
from api_schemas.jobs import JobError, StepMetrics
from api_schemas.preview import ResultRequest
from service.db.engine import clock
from service.db.tables import Adapter, Application, Batch, Job, Run, Step, Version, Worker
from service.errors import Conflict, LeaseLost, NotFound
from service.store import adapters, events, leased, queue, retries, transitions
from service.store.ids import new_id
from service.store.rules import Rules


def seen(s: Session, worker_id: str, base_model: str) -> None:
    """Note that this worker is there."""
    now = clock(s)
    row = s.get(Worker, worker_id)
    if row is None:
        s.add(Worker(id=worker_id, base_model=base_model, last_seen_at=now))
    else:
        row.base_model, row.last_seen_at = base_model, now


def claim(s: Session, request: wire.LeaseRequest, rules: Rules) -> wire.Lease | None:
    """The next training batch of the adapter whose turn it is, under a new fencing token; None when there is none."""
    seen(s, request.worker_id, request.base_model)
    now = clock(s)
    while (adapter := queue.pick(s, request.base_model, now, rules)) is not None:
        if adapter.lease_run is not None:  # expired: its worker is dead or frozen
            _lost(s, adapter, adapter.lease_run, rules, now)
        if adapter.blocked_by is None and (jobs := queue.form(s, adapter, rules)):
            run = _open_run(s, adapter, jobs, request.worker_id, now, rules)
            queue.took_turn(s, adapter, now)
            return leased.lease(s, adapter, run, jobs, rules)
        s.flush()  # all it had is over now: it is not picked again
    return None


def _lost(s: Session, adapter: Adapter, run_id: str, rules: Rules, now: float) -> None:
    """A lost lease is an attempt: a job that kills its host is not tried for ever."""
    run = s.get_one(Run, run_id)
    jobs = _jobs_of(s, run)
    error = JobError(
        code="worker_lost", message=f"Worker '{run.worker_id}' was not heard of any more; its lease ran out."
    )
    retries.set_back(s, adapter, jobs, error, rules, retryable=True, apart=False)
    _close(adapter, run, "lost", now)


def _jobs_of(s: Session, run: Run) -> list[Job]:
    query = select(Job).where(Job.run_id == run.id, Job.adapter_id == run.adapter_id, Job.state == "running")
    return list(s.scalars(query.order_by(Job.seq)))


def _open_run(s: Session, adapter: Adapter, jobs: Sequence[Job], worker_id: str, now: float, rules: Rules) -> Run:
    adapter.token += 1
    run = Run(
        id=new_id("run"),
        adapter_id=adapter.id,
        token=adapter.token,
        worker_id=worker_id,
        parent_n=adapter.head_n,
        seed=leased.seed_of(s, jobs),
        started_at=now,
    )
    s.add(run)
    s.flush()
    adapter.lease_run, adapter.lease_until = run.id, now + rules.lease_seconds
    for job in jobs:
        transitions.running(s, adapter, job, run, now)
    return run


def held(s: Session, run_id: str, token: int) -> tuple[Run, Adapter]:
    """The run and its adapter, if this token is still the newest. Raises LeaseLost otherwise."""
    run = s.get(Run, run_id)
    if run is None:
        raise NotFound("No such run.", code="run_not_found")
    adapter = adapters.locked(s, run.adapter_id)
    s.refresh(run)  # read before the lock was ours
    if run.token != token or adapter.token != token or adapter.lease_run != run.id or run.state != "running":
        raise LeaseLost("This lease is over: another run or a cancellation has taken the adapter.")
    return run, adapter


def heartbeat(s: Session, run_id: str, beat: wire.Heartbeat, lease_seconds: float) -> None:
    """Extend the lease and keep what was reported. Steps sent again are kept once."""
    run, adapter = held(s, run_id, beat.token)
    now = clock(s)
    adapter.lease_until = now + lease_seconds
    if beat.progress is not None:
        run.progress = beat.progress.model_dump()
    _keep_steps(s, run.id, beat.metrics)
    worker = s.get(Worker, run.worker_id)
    if worker is not None:
        worker.last_seen_at = now


def _keep_steps(s: Session, run_id: str, steps: Sequence[StepMetrics]) -> None:
    for step in steps:
        s.merge(Step(run_id=run_id, step=step.step, metrics=step.model_dump(exclude_none=True)))


def committed(s: Session, run_id: str) -> Version | None:
    """The version of this run, if its commit went through before: the acknowledgement may have been lost."""
    return s.scalar(select(Version).where(Version.run_id == run_id))


def commit(s: Session, run_id: str, request: wire.CommitRequest, *, digest: str, size_bytes: int) -> Version:
    """The whole effect of a run in one transaction: version, applications, jobs, head. Raises LeaseLost; Conflict for a
    preview, which has none."""
    try:
        run, adapter = held(s, run_id, request.token)
    except LeaseLost:
        if (known := committed(s, run_id)) is not None:  # by this very request, sent before
            return known
        raise
    if adapter.head_n != run.parent_n:
        raise LeaseLost("The adapter's head moved while this run was training.")
    now, n = clock(s), adapter.next_n
    jobs = _jobs_of(s, run)
    if jobs[0].kind == "preview":
        raise Conflict("This run is a preview: send its result, not a version.", code="not_a_training")
    batch = s.get_one(Batch, jobs[0].batch_id)
    version = Version(
        adapter_id=adapter.id,
        n=n,
        parent_n=run.parent_n,
        run_id=run.id,
        uri=request.uri,
        digest=digest,
        files=[f.model_dump() for f in request.files],
        size_bytes=size_bytes,
        training=batch.training,
        seed=run.seed,
        metrics=[m.model_dump(exclude_none=True) for m in request.metrics],
        items=[i.model_dump() for i in request.items],
        standing=list(request.standing_feedback),
        training_seconds=request.training_seconds,
        canary=request.canary.model_dump() if request.canary else None,
        created_at=now,
    )
    s.add(version)
    events.record(s, adapter, "version.created", now, version=n)
    for job in jobs:
        s.add(Application(job_id=job.id, adapter_id=adapter.id, version_n=n))
        transitions.succeeded(s, adapter, job, now, n)
    _keep_steps(s, run.id, request.metrics)
    _close(adapter, run, "committed", now)
    adapter.head_n, adapter.next_n = n, n + 1
    adapter.run_after = 0.0
    s.flush()
    return version


def answer(s: Session, run_id: str, request: ResultRequest) -> None:
    """A preview's end: its result is kept with the job and nothing else changes. Sent again it is harmless.

    Raises LeaseLost; Conflict for a run that is to end in a version.
    """
    try:
        run, adapter = held(s, run_id, request.token)
    except LeaseLost:
        known = s.get_one(Run, run_id)
        if (known.state, known.token) == ("answered", request.token):
            return
        raise
    [job, *_] = _jobs_of(s, run)
    if job.kind != "preview":
        raise Conflict("This run is a training: commit its version.", code="not_a_preview")
    now = clock(s)
    job.result = request.preview.model_dump(exclude_none=True)
    transitions.succeeded(s, adapter, job, now, None)
    _close(adapter, run, "answered", now)


def fail(s: Session, run_id: str, request: wire.FailRequest, rules: Rules) -> None:
    """The run came to nothing. Its jobs are queued again after a pause, each alone, or failed for good."""
    run, adapter = held(s, run_id, request.token)
    jobs = _jobs_of(s, run)
    retries.set_back(s, adapter, jobs, request.error, rules, retryable=request.retryable, apart=True)
    if request.retryable:
        retries.hold_off(s, adapter, jobs, rules)
    _close(adapter, run, "failed", clock(s))


def release(s: Session, run_id: str, token: int) -> None:
    """The worker gives the lease back: the jobs are queued again, no attempt is counted."""
    run, adapter = held(s, run_id, token)
    now = clock(s)
    for job in _jobs_of(s, run):
        transitions.queued(s, adapter, job, now, "released")
    _close(adapter, run, "released", now)


def _close(adapter: Adapter, run: Run, state: str, now: float) -> None:
    run.state, run.ended_at = state, now
    adapter.lease_run = None
    adapter.lease_until = None


def cancel(s: Session, job: Job) -> None:
    """A queued or running job ends; what was running is fenced. Ended jobs are left as they are."""
    now, adapter = clock(s), adapters.locked(s, job.adapter_id)
    s.refresh(job)  # read before the lock was ours
    if job.state not in ("queued", "running"):
        return
    if job.state == "running" and adapter.lease_run == job.run_id and job.run_id is not None:
        run = s.get_one(Run, job.run_id)
        for other in _jobs_of(s, run):  # trained along with this one
            if other.id != job.id:
                transitions.queued(s, adapter, other, now, "cancelled_beside")
        adapter.token += 1
        _close(adapter, run, "cancelled", now)
    transitions.cancelled(s, adapter, job, now)
