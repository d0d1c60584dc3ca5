"""Rollouts and feedback that have had their time go, a few at a time, oldest first."""

from __future__ import annotations

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from service.db.tables import Batch, Item, Job, Rollout
from service.store import erasure

OPEN = ("queued", "running")


def expire_feedback(s: Session, before: float, limit: int) -> int:
    """Empty items of batches that came before this time (Unix seconds) and whose jobs have all ended; how many.

    What stands in versions stays: it is what the next batch's teacher is told, and goes with an erasure on request.
    """
    waits = exists().where(Job.batch_id == Batch.id, Job.state.in_(OPEN))
    old = (
        select(Item)
        .join(Batch, Batch.id == Item.batch_id)
        .where(Batch.created_at < before, Item.erased_at.is_(None), ~waits)
        .order_by(Batch.created_at, Item.id)
        .limit(limit)
    )
    items = s.scalars(old).all()
    if items:
        erasure.erase(s, items, (), "retention", erasure.Erased())
    return len(items)


def expire_rollouts(s: Session, before: float, limit: int) -> int:
    """Delete answers from before this time (Unix seconds) that no feedback is about; how many."""
    about = exists().where(Item.rollout_id == Rollout.id)
    old = select(Rollout.id).where(Rollout.created_at < before, ~about).order_by(Rollout.created_at).limit(limit)
    return len(s.execute(delete(Rollout).where(Rollout.id.in_(old)).returning(Rollout.id)).all())
