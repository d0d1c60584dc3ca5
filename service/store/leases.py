"""The lease protocol: claim, heartbeat, commit, fail, release.

The adapter's row is the mutex, its `token` the fencing token: every claim raises it, and every later call must show it.
A lease alone is not safe, since a frozen process wakes up; the token check in the committing transaction is.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, and_, or_, select, update
from sqlalchemy.orm import Session

import api_schemas.worker as wire
from api_schemas.jobs import StepMetrics
from api_schemas.training import LoraSettings, ResolvedTraining
from service.db.engine import clock
from service.db.tables import Adapter, Application, Batch, Item, Job, Rollout, Run, Step, Version, Worker
from service.errors import LeaseLost, NotFound
from service.store import adapters, feedback
from service.store.ids import new_id

MAX_ERROR = 4000
"""Characters of a worker's error message that are kept."""


def seen(s: Session, worker_id: str, base_model: str) -> None:
    """Note that this worker is there."""
    now = clock(s)
    row = s.get(Worker, worker_id)
    if row is None:
        s.add(Worker(id=worker_id, base_model=base_model, last_seen_at=now))
    else:
        row.base_model, row.last_seen_at = base_model, now


def claim(
    s: Session, request: wire.LeaseRequest, lease_seconds: float, canary_prompt: str | None = None
) -> wire.Lease | None:
    """The oldest open job of an adapter that nobody holds, under a new fencing token; None when there is none."""
    seen(s, request.worker_id, request.base_model)
    now = clock(s)
    first = _first_open(request.base_model, now)
    # An adapter whose row another transaction holds is passed over for a free one; if there is none, wait for the row:
    # it may be the publisher's, for a moment. (SQLite has one writer and locks no rows.)
    picked = (
        s.execute(first.with_for_update(skip_locked=True, of=Adapter)).first()
        or s.execute(first.with_for_update(of=Adapter)).first()
    )
    if picked is None:
        return None
    adapter, job = picked
    s.refresh(job)  # read before the adapter's row was ours
    if job.state not in ("queued", "running"):
        return None  # it has just ended; the next look finds the one after it
    run = _open_run(s, adapter, request.worker_id, now, lease_seconds)
    job.state, job.run_id, job.started_at = "running", run.id, now
    s.flush()
    lease = _lease(s, adapter, run, [job], lease_seconds)
    return lease.model_copy(update={"canary_prompt": canary_prompt})


def _first_open(base_model: str, now: float) -> Select[Adapter, Job]:
    """The oldest open job whose adapter nobody holds, with its adapter."""
    return (
        select(Adapter, Job)
        .join(
            Job,
            and_(
                Job.adapter_id == Adapter.id,
                Job.state.in_(("queued", "running")),
                # Strict order: only the first open job of an adapter may run.
                Job.seq
                == select(Job.seq)
                .where(Job.adapter_id == Adapter.id, Job.state.in_(("queued", "running")))
                .order_by(Job.seq)
                .limit(1)
                .scalar_subquery()
                .correlate(Adapter),
            ),
        )
        .where(
            Adapter.base_model == base_model,
            Adapter.open_jobs > 0,
            Adapter.deleted_at.is_(None),
            Adapter.run_after <= now,
            or_(Adapter.lease_until.is_(None), Adapter.lease_until < now),
        )
        .order_by(Job.created_at, Job.id)
        .limit(1)
    )


def _open_run(s: Session, adapter: Adapter, worker_id: str, now: float, lease_seconds: float) -> Run:
    if adapter.lease_run is not None:  # expired: its worker is dead or frozen
        s.execute(
            update(Run).where(Run.id == adapter.lease_run, Run.state == "running").values(state="lost", ended_at=now)
        )
    adapter.token += 1
    run = Run(
        id=new_id("run"),
        adapter_id=adapter.id,
        token=adapter.token,
        worker_id=worker_id,
        parent_n=adapter.head_n,
        seed=0,
        started_at=now,
    )
    s.add(run)
    s.flush()
    adapter.lease_run, adapter.lease_until = run.id, now + lease_seconds
    return run


def _lease(s: Session, adapter: Adapter, run: Run, jobs: Sequence[Job], lease_seconds: float) -> wire.Lease:
    batch_ids = [job.batch_id for job in jobs]
    training = ResolvedTraining.model_validate(s.get_one(Batch, batch_ids[0]).training)
    parent = s.get_one(Version, (adapter.id, run.parent_n)) if run.parent_n else None
    # A retry of the same job trains the same way: the seed follows the job, not the attempt.
    run.seed = training.seed if training.seed is not None else jobs[0].seq
    return wire.Lease(
        run_id=run.id,
        token=run.token,
        lease_seconds=lease_seconds,
        adapter_id=adapter.id,
        adapter=adapter.name,
        base_model=adapter.base_model,
        lora=LoraSettings.model_validate(adapter.lora),
        training=training,
        seed=run.seed,
        parent=wire.ParentVersion(version=parent.n, uri=parent.uri, digest=parent.digest) if parent else None,
        standing_feedback=list(parent.standing) if parent else [],
        batch_ids=batch_ids,
        items=[_leased_item(s, item) for item in feedback.items_of(s, batch_ids)],
    )


def _leased_item(s: Session, item: Item) -> wire.LeasedItem:
    rollout = s.get_one(Rollout, item.rollout_id) if item.rollout_id is not None else None
    return wire.LeasedItem(
        id=item.id,
        messages=rollout.messages if rollout else item.messages or [],
        tools=rollout.tools if rollout else None,
        response=rollout.response if rollout else item.response or "",
        prompt_token_ids=rollout.prompt_token_ids if rollout else None,
        response_token_ids=rollout.response_token_ids if rollout else None,
        behaviour_logprobs=rollout.logprobs if rollout else None,
        logprobs_mode=rollout.logprobs_mode if rollout else None,
        sampling=rollout.sampling if rollout else {},
        version=rollout.version_n if rollout else None,
        feedback=item.feedback,
        demonstration=item.demonstration,
        standing=item.standing,
    )


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
    """The whole effect of a run in one transaction: version, applications, jobs, head. Raises LeaseLost."""
    try:
        run, adapter = held(s, run_id, request.token)
    except LeaseLost:
        if (known := committed(s, run_id)) is not None:  # by this very request, sent before
            return known
        raise
    if adapter.head_n != run.parent_n:
        raise LeaseLost("The adapter's head moved while this run was training.")
    now, n = clock(s), adapter.next_n
    jobs = list(s.scalars(select(Job).where(Job.run_id == run.id, Job.state == "running")))
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
    for job in jobs:
        s.add(Application(job_id=job.id, adapter_id=adapter.id, version_n=n))
        job.state, job.version_n, job.finished_at, job.error = "succeeded", n, now, None
    _keep_steps(s, run.id, request.metrics)
    _close(adapter, run, "committed", now)
    adapter.head_n, adapter.next_n = n, n + 1
    adapter.open_jobs -= len(jobs)
    adapter.run_after = 0.0
    s.flush()
    return version


def fail(s: Session, run_id: str, request: wire.FailRequest, *, max_attempts: int, backoff: float) -> None:
    """The run came to nothing. Its jobs are queued again after a pause, or failed for good."""
    run, adapter = held(s, run_id, request.token)
    now = clock(s)
    for job in s.scalars(select(Job).where(Job.run_id == run.id, Job.state == "running")):
        job.attempts += 1
        job.error = {"code": request.error.code[:64], "message": request.error.message[:MAX_ERROR]}
        if request.retryable and job.attempts < max_attempts:
            job.state = "queued"
            adapter.run_after = now + backoff * 2 ** (job.attempts - 1)
        else:
            job.state, job.finished_at = "failed", now
            adapter.open_jobs -= 1
    _close(adapter, run, "failed", now)


def release(s: Session, run_id: str, token: int) -> None:
    """The worker gives the lease back: the jobs are queued again, no attempt is counted."""
    run, adapter = held(s, run_id, token)
    s.execute(update(Job).where(Job.run_id == run.id, Job.state == "running").values(state="queued"))
    _close(adapter, run, "released", clock(s))


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
        # Jobs that were trained along with this one go back to the queue.
        s.execute(
            update(Job).where(Job.run_id == run.id, Job.state == "running", Job.id != job.id).values(state="queued")
        )
        adapter.token += 1
        _close(adapter, run, "cancelled", now)
    job.state, job.finished_at = "cancelled", now
    adapter.open_jobs -= 1
