"""Building an adapter anew: back to the last version that never saw what was erased, then what is left, in order.

Each version that was trained since becomes one training batch again, of the same jobs' items less what was erased,
with its own settings and its own seed. "Never saw it" means: the versions that come out are those of an adapter that
started from the same clean version and was sent the same remaining feedback. Answers that versions in between gave
stay what they are, answers of those versions; nothing is generated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.engine import clock
from service.db.tables import Adapter, Batch, Item, Job, Version
from service.errors import Conflict
from service.store import adapters, events, lineage, queue, transitions
from service.store.ids import new_id


@dataclass(frozen=True)
class Started:
    origin: int
    replaced: list[int]
    job_ids: list[str]


def start(s: Session, adapter: Adapter, *, hold: bool) -> Started:
    """Move the training head back and queue the replays, before what waits already. The adapter's row is locked.

    `hold`: the alias stays where it is until the replays have ended. Raises Conflict when nothing that was erased is in
    any version, and when the feedback or the files that would be needed are not kept any more.
    """
    tainted = select(Version).where(
        Version.adapter_id == adapter.id, Version.tainted_at.is_not(None), Version.retired_at.is_(None)
    )
    replaced = list(s.scalars(tainted.order_by(Version.n)))
    if not replaced:
        raise Conflict("No version of this adapter has learnt anything that was erased.", code="nothing_to_rebuild")
    origin, again = _plan(s, adapter)
    for version in again:
        _check_complete(s, version)
    jobs = _train_again(s, adapter, origin, again) if again else []
    now = clock(s)
    for version in replaced:
        version.retired_at = now
    adapter.held_until_seq = _last_replay(s, adapter) if hold else None
    return Started(origin, [v.n for v in replaced], [job.id for job in jobs])


def _train_again(s: Session, adapter: Adapter, origin: int, again: Sequence[Version]) -> list[Job]:
    adapters.move_head(s, adapter, origin)
    events.record(s, adapter, "adapter.rebuilding", clock(s), version=origin)
    waiting = list(s.scalars(select(Job).where(Job.adapter_id == adapter.id, Job.state == "queued").order_by(Job.seq)))
    jobs = [job for version in again for job in _replay(s, adapter, version)]
    _move_behind(s, adapter, waiting)
    return jobs


def check_none_runs(s: Session, adapter: Adapter) -> None:
    """Raises Conflict while replays wait or train: another head would have them trained on something else."""
    if _last_replay(s, adapter) is not None:
        raise Conflict(
            "The adapter is being built anew: wait until its replays have ended, or cancel them.", code="rebuild_runs"
        )


def _last_replay(s: Session, adapter: Adapter) -> int | None:
    """Sequence number of the last one that waits or trains, of this rebuild or of one before."""
    replays = select(func.max(Job.seq)).where(
        Job.adapter_id == adapter.id, Job.kind == "replay", Job.state.in_(transitions.OPEN)
    )
    return s.scalar(replays)


def _plan(s: Session, adapter: Adapter) -> tuple[int, list[Version]]:
    """Where to begin, and what to train again from there, oldest first.

    Only what the head came of counts. An upload ends the way back: its weights came from elsewhere.
    """
    since: list[Version] = []
    needed = 0
    for version in lineage.line(s, adapter.id, adapter.head_n):
        if version.source == "upload":
            break
        since.append(version)
        if version.tainted_at is not None:
            needed = len(since)
    again = since[:needed]
    for version in since[needed:]:  # the parent it would begin from
        if version.files_doomed_at is None:
            break
        again.append(version)
    origin = again[-1].parent_n if again else adapter.head_n
    if origin and s.get_one(Version, (adapter.id, origin)).files_doomed_at is not None:
        raise _impossible(f"the files of the uploaded version {origin} were removed")
    return origin, again[::-1]


def _check_complete(s: Session, version: Version) -> None:
    """Raises Conflict when retention has taken what it learnt from: a version without it would be another one."""
    batch_ids = [job.batch_id for job in lineage.jobs_of(s, version)]
    expired = select(Item.id).where(Item.batch_id.in_(batch_ids), Item.erased_by == "retention")
    if s.scalar(expired.limit(1)) is not None:
        raise _impossible(f"the feedback that version {version.n} learnt from has expired")


def _impossible(why: str) -> Conflict:
    return Conflict(
        f"The adapter cannot be built anew: {why}. Promote a version that never saw it, or 0.", code="not_rebuildable"
    )


def _replay(s: Session, adapter: Adapter, version: Version) -> list[Job]:
    """One training batch, of those of its jobs that have items left."""
    applied = lineage.jobs_of(s, version)
    living = select(Item.batch_id).where(Item.batch_id.in_([j.batch_id for j in applied]), Item.erased_at.is_(None))
    left = set(s.scalars(living))
    together = new_id("rep")
    return [
        queue.enqueue(
            s, adapter.id, s.get_one(Batch, job.batch_id),
            kind="replay", priority=job.priority, seed=version.seed, together=together,
        )
        for job in applied
        if job.batch_id in left
    ]  # fmt: skip


def _move_behind(s: Session, adapter: Adapter, waiting: Sequence[Job]) -> None:
    """What waited before the rebuild comes after it, in the old order. Training batches that were formed keep the seed
    they would have had: a retry trains the same."""
    for job in waiting:
        if job.seed is None and job.together is not None and s.get_one(Batch, job.batch_id).training["seed"] is None:
            job.seed = job.seq
        job.seq, adapter.next_seq = adapter.next_seq, adapter.next_seq + 1
    s.flush()
