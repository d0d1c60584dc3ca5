"""Erasure: texts and tokens leave the database, what was to learn from them does not, and what did learn is named.

Of an item its row stays, empty, so that a version's record still says how many remarks it learnt from. An answer goes
whole. An erasure takes the adapter's row first, like a claim and a commit: an item is either learnt before it, and the
version is marked, or never. What trains on it at this moment is fenced and trained again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.db.engine import Database, clock
from service.db.tables import Adapter, Application, Batch, Item, Job, Rollout, Run, Tenant, Version
from service.store import adapters, leases, lineage, scrubbing, transitions

Cause = Literal["request", "retention"]
ERASED = {"code": "feedback_erased", "message": "Feedback of this job was erased, and with it what was said here."}
AT_ONCE = 200
"""Items or answers of one transaction: nobody waits long for it to end."""


@dataclass
class Erased:
    """What one erasure did. Adapters by name."""

    items: set[str] = field(default_factory=set)
    rollouts: set[str] = field(default_factory=set)
    kept_rollouts: set[str] = field(default_factory=set)
    """Answers of erased items that other items are about."""
    cancelled_jobs: set[str] = field(default_factory=set)
    """Nothing was left for them to learn."""
    batches: set[str] = field(default_factory=set)
    """Of the items."""


Choice = Callable[[Session], tuple[Sequence[Item], Collection[str]]]
"""The next items and answers (by id) that are to go, at most `AT_ONCE` of either; none when all are gone."""


def erase_all(database: Database, tenant_id: str, choose: Choice, done: Erased) -> None:
    """Everything that a tenant's caller chose, in small transactions. Safe to be killed in, and to be repeated."""
    while True:
        with database.write() as s:
            s.execute(
                select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True)
            )  # as new feedback does
            items, rollout_ids = choose(s)
            if not items and not rollout_ids:
                return
            erase(s, items, rollout_ids, "request", done)
            scrubbing.wanted(s)


def erase(s: Session, items: Sequence[Item], rollout_ids: Collection[str], cause: Cause, done: Erased) -> None:
    """Empty these items and whatever is about these answers; remove the answers, and those that nobody is about then.

    The items of one transaction: callers give at most `AT_ONCE`, and loop.
    """
    about = s.scalars(select(Item).where(Item.rollout_id.in_(rollout_ids), Item.erased_at.is_(None)))
    # What has expired is gone, but for its remark where that still stands: a request takes this as well.
    living = {
        i.id: i for i in (*items, *about) if i.erased_by is None or (cause, i.erased_by) == ("request", "retention")
    }
    answers = {*rollout_ids, *(i.rollout_id for i in living.values() if i.rollout_id is not None)}
    batches = {b.id: b for b in s.scalars(select(Batch).where(Batch.id.in_({i.batch_id for i in living.values()})))}
    for adapter_id in sorted({b.adapter_id for b in batches.values()}):
        adapter = adapters.locked(s, adapter_id)
        theirs = [i for i in living.values() if batches[i.batch_id].adapter_id == adapter_id]
        if cause == "request":
            _unlearn(s, adapter, theirs)
        _empty(s, theirs, cause)
        _settle_jobs(s, adapter, [batches[b] for b in sorted({i.batch_id for i in theirs})], done)
    done.items |= living.keys()
    done.batches |= batches.keys()
    _remove_answers(s, answers, done)


def learners(s: Session, batch_ids: Collection[str]) -> dict[str, list[int]]:
    """Versions that have learnt what was erased from these batches, by the adapter's name; as often as it is asked."""
    found: dict[str, list[int]] = {}
    owners = select(Batch.adapter_id).where(Batch.id.in_(batch_ids))
    for adapter in s.scalars(select(Adapter).where(Adapter.id.in_(owners))):
        versions = lineage.since(s, adapter.id, sorted(batch_ids))
        if numbers := [v.n for v in versions if v.tainted_at is not None]:
            found[adapter.name] = numbers
    return found


def _unlearn(s: Session, adapter: Adapter, items: Sequence[Item]) -> None:
    """Mark what has learnt from the items, take their remarks out of what stands, and fence who trains with them."""
    batch_ids = sorted({i.batch_id for i in items})
    remarks = _no_longer_said(s, adapter, items)
    now = clock(s)
    for version in lineage.learners(s, adapter.id, batch_ids, remarks):
        version.tainted_at = version.tainted_at or now
    changed = _forget(s, adapter, remarks) if remarks else set()
    run = s.get(Run, adapter.lease_run) if adapter.lease_run is not None else None
    if run is not None:
        training = select(Job.id).where(Job.run_id == run.id, Job.state == "running", Job.batch_id.in_(batch_ids))
        if run.parent_n in changed or s.scalar(training.limit(1)) is not None:
            adapters.move_head(s, adapter, adapter.head_n)


def _forget(s: Session, adapter: Adapter, remarks: Collection[str]) -> set[int]:
    """Take remarks out of what stands; the versions whose list was changed."""
    changed = set()
    for version in s.scalars(select(Version).where(Version.adapter_id == adapter.id)):
        kept = [r for r in version.standing if r not in remarks]
        if len(kept) < len(version.standing):
            version.standing = kept
            changed.add(version.n)
    return changed


def _no_longer_said(s: Session, adapter: Adapter, items: Sequence[Item]) -> set[str]:
    """Standing remarks of the items that no other learnt item of the adapter holds as well.

    What an expired item said is not known any more: it counts as everything that stands and that nobody else says.
    """
    said = {i.feedback.strip() for i in items if i.standing}
    if any(i.erased_by == "retention" for i in items):
        standing = s.scalars(select(Version.standing).where(Version.adapter_id == adapter.id))
        said |= {remark for remarks in standing for remark in remarks}
    others = (
        select(Item.feedback)
        .join(Batch, Batch.id == Item.batch_id)
        .join(Job, Job.batch_id == Batch.id)
        .join(Application, Application.job_id == Job.id)
        .where(
            Batch.adapter_id == adapter.id,
            Item.standing.is_(True),
            Item.erased_at.is_(None),
            func.trim(Item.feedback).in_(said),
            Item.id.not_in([i.id for i in items]),
        )
    )
    return said - {text.strip() for text in s.scalars(others)}


def _empty(s: Session, items: Sequence[Item], cause: Cause) -> None:
    """An expired one still says whose it was: a request to erase all of theirs finds it."""
    now = clock(s)
    whose: dict[str, str | None] = {}
    if cause == "retention":
        ids = [i.rollout_id for i in items if i.rollout_id is not None]
        owners = select(Rollout.id, Rollout.person).where(Rollout.id.in_(ids))
        whose = {row.id: row.person for row in s.execute(owners)}
    values = {
        "rollout_id": None, "messages": None, "response": "", "feedback": "", "demonstration": None, "standing": False,
        "erased_at": now, "erased_by": cause,
    }  # fmt: skip
    for item in items:
        item.person = (item.person or whose.get(item.rollout_id or "")) if cause == "retention" else None
        for name, value in values.items():
            setattr(item, name, value)
    s.flush()


def _settle_jobs(s: Session, adapter: Adapter, batches: Sequence[Batch], done: Erased) -> None:
    """Words about the items go from jobs and batches; an open job that has nothing left to learn ends."""
    ids = [b.id for b in batches]
    for batch in batches:
        batch.body_hash = ""
    left = set(s.scalars(select(Item.batch_id).where(Item.batch_id.in_(ids), Item.erased_at.is_(None))))
    for job in s.scalars(select(Job).where(Job.batch_id.in_(ids))):
        job.result = None
        if job.error is not None:
            job.error = ERASED
        if job.batch_id not in left and job.state in ("queued", "running", "failed"):
            _end(s, adapter, job, done)
    s.flush()


def _end(s: Session, adapter: Adapter, job: Job, done: Erased) -> None:
    """A job that has nothing left to learn; one that had failed cannot be queued again any more."""
    if job.state == "failed":
        transitions.cancelled(s, adapter, job, clock(s))
        if adapter.blocked_by == job.id:
            adapter.blocked_by = None
        return
    leases.cancel(s, job)
    job.error = ERASED
    done.cancelled_jobs.add(job.id)


def _remove_answers(s: Session, rollout_ids: Collection[str], done: Erased) -> None:
    """Those that no item is about any more."""
    needed = set(s.scalars(select(Item.rollout_id).where(Item.rollout_id.in_(rollout_ids)))) - {None}
    done.kept_rollouts |= {r for r in needed if r is not None}
    going = [r for r in rollout_ids if r not in needed]
    done.rollouts |= set(s.scalars(delete(Rollout).where(Rollout.id.in_(going)).returning(Rollout.id)))
