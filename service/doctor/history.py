"""What was learnt: parents are older, successes applied, nothing twice on one line, nothing accepted and lost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sqlalchemy import Select, exists, select
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.tables import Adapter, Application, Batch, Item, Job, Version
from service.doctor.findings import Finding
from service.store import adapters, lineage, queue, transitions


def check(database: Database) -> Iterator[Finding]:
    with database.read() as s:
        found = [*_parents(s), *_applications(s), *_unapplied(s), *_twice(s)]
        lost = list(s.execute(_without_job()))
    yield from (_as_finding(database, *f) for f in found)
    for batch_id, adapter_id in lost:
        yield Finding(
            "batch_without_job",
            batch_id,
            "It was accepted, and no job trains it.",
            partial(_enqueue, database, adapter_id, batch_id),
        )


def _as_finding(database: Database, code: str, subject: str, message: str, job_id: str | None) -> Finding:
    repair = None if job_id is None else partial(_succeed, database, job_id)
    return Finding(code, subject, message, repair)


Found = tuple[str, str, str, str | None]


def _parents(s: Session) -> Iterator[Found]:
    known = {(v.adapter_id, v.n): v.parent_n for v in s.scalars(select(Version))}
    for (adapter_id, n), parent in known.items():
        if parent >= n or (parent and (adapter_id, parent) not in known):
            why = "is not older than it" if parent >= n else "does not exist"
            yield (
                "parent_wrong",
                f"{adapter_id} v{n}",
                f"Its parent, version {parent}, {why}. Promote a good one.",
                None,
            )


def _applications(s: Session) -> Iterator[Found]:
    """The application is the truth: it was written with the version."""
    rows = s.execute(
        select(Job, Application.version_n)
        .join(Application, Application.job_id == Job.id)
        .join(Version, (Version.adapter_id == Application.adapter_id) & (Version.n == Application.version_n))
        .where(Version.status != "rejected")
    )
    for job, n in rows:
        if (job.state, job.version_n) != ("succeeded", n):
            yield "applied_and_not_ended", job.id, f"It was applied in version {n} and is '{job.state}'.", job.id


def _succeed(database: Database, job_id: str) -> None:
    with database.write() as s:
        job = s.get_one(Job, job_id)
        adapter = adapters.locked(s, job.adapter_id)
        s.refresh(job)
        applied = s.get(Application, job_id)
        if applied is not None and (job.state, job.version_n) != ("succeeded", applied.version_n):
            transitions.succeeded(s, adapter, job, job.finished_at or job.created_at, applied.version_n)


def _unapplied(s: Session) -> Iterator[Found]:
    applied = exists().where(Application.job_id == Job.id)
    for job in s.scalars(select(Job).where(Job.state == "succeeded", Job.kind != "preview", ~applied)):
        yield "succeeded_and_not_applied", job.id, "It is said to have succeeded, and no version applied it.", None


def _twice(s: Session) -> Iterator[Found]:
    for adapter in s.scalars(select(Adapter).where(Adapter.deleted_at.is_(None))):
        seen: set[str] = set()
        for version in _whole_line(s, adapter):
            for job in lineage.jobs_of(s, version):
                if job.batch_id in seen:
                    message = f"Its batch {job.batch_id} was applied twice on the way to the head of {adapter.id}."
                    yield "applied_twice", job.id, message, None
                seen.add(job.batch_id)


def _whole_line(s: Session, adapter: Adapter) -> Iterator[Version]:
    """As far as it leads: a parent that is missing or no older is named elsewhere."""
    version = s.get(Version, (adapter.id, adapter.head_n))
    while version is not None:
        yield version
        version = s.get(Version, (adapter.id, version.parent_n)) if version.parent_n < version.n else None


def _without_job() -> Select[str, str]:
    job = exists().where(Job.batch_id == Batch.id)
    living = exists().where(Item.batch_id == Batch.id, Item.erased_at.is_(None))
    alive = select(Adapter.id).where(Adapter.deleted_at.is_(None))
    return select(Batch.id, Batch.adapter_id).where(~job, living, Batch.adapter_id.in_(alive))


def _enqueue(database: Database, adapter_id: str, batch_id: str) -> None:
    with database.write() as s:
        adapters.locked(s, adapter_id)
        batch = s.get_one(Batch, batch_id)
        if s.scalar(select(Job.id).where(Job.batch_id == batch_id).limit(1)) is None:
            queue.enqueue(s, adapter_id, batch)
