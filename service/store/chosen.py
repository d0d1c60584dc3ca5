"""What a caller may choose to erase: looked up as theirs, and given out in pieces."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api_schemas.sampling import MAX_CHOICES
from service.db.tables import Batch, Item, Rollout
from service.errors import NotFound
from service.store import feedback, rollouts
from service.store.erasure import AT_ONCE, Choice

_STILL_THERE = or_(Item.erased_by.is_(None), Item.erased_by == "retention")
"""What has expired may have left its remark among those that stand."""


def item_of_tenant(s: Session, tenant_id: str, item_id: str) -> Item:
    query = select(Item).join(Batch, Batch.id == Item.batch_id)
    item = s.scalar(query.where(Item.id == item_id, Batch.tenant_id == tenant_id))
    if item is None:
        raise NotFound("You have no feedback item of that id.", code="item_not_found", param="item")
    return item


def item_ids(s: Session, tenant_id: str, batch_id: str) -> list[str]:
    """Of the tenant's batch. Raises NotFound."""
    batch = feedback.batch_of_tenant(s, tenant_id, batch_id)
    return list(s.scalars(select(Item.id).where(Item.batch_id == batch.id)))


def choices_of(s: Session, tenant_id: str, completion_id: str) -> list[str]:
    """Rollouts of all choices of the tenant's completion. Raises NotFound."""
    names = [rollouts.id_of(completion_id, n) for n in range(MAX_CHOICES)]
    found = list(s.scalars(select(Rollout.id).where(Rollout.id.in_(names), Rollout.tenant_id == tenant_id)))
    if not found:
        raise NotFound("No completion of yours of that id is stored.", code="completion_not_found", param="completion")
    return found


def items(ids: Collection[str]) -> Choice:
    def choose(s: Session) -> tuple[Sequence[Item], Collection[str]]:
        query = select(Item).where(Item.id.in_(ids), _STILL_THERE)
        return s.scalars(query.limit(AT_ONCE)).all(), ()

    return choose


def answers(ids: Collection[str]) -> Choice:
    def choose(s: Session) -> tuple[Sequence[Item], Collection[str]]:
        return (), s.scalars(select(Rollout.id).where(Rollout.id.in_(ids)).limit(AT_ONCE)).all()

    return choose


def of_person(tenant_id: str, person: str) -> Choice:
    """Everything that is known to be this person's."""

    def choose(s: Session) -> tuple[Sequence[Item], Collection[str]]:
        sent = select(Item).join(Batch, Batch.id == Item.batch_id).where(Item.person == person)
        asked = select(Rollout.id).where(Rollout.tenant_id == tenant_id, Rollout.person == person)
        found = s.scalars(sent.where(Batch.tenant_id == tenant_id).limit(AT_ONCE)).all()
        return found, s.scalars(asked.limit(AT_ONCE)).all()

    return choose


def of_tenant(tenant_id: str) -> Choice:
    """Everything that was said to or by a tenant."""

    def choose(s: Session) -> tuple[Sequence[Item], Collection[str]]:
        sent = select(Item).join(Batch, Batch.id == Item.batch_id).where(Batch.tenant_id == tenant_id)
        asked = select(Rollout.id).where(Rollout.tenant_id == tenant_id)
        return s.scalars(sent.where(_STILL_THERE).limit(AT_ONCE)).all(), s.scalars(asked.limit(AT_ONCE)).all()

    return choose
