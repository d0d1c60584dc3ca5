"""Webhook endpoints as their tenant sees them."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import delete as sql_delete
from sqlalchemy import func, select
from sqlalchemy.orm import Session

import api_schemas.webhooks as wire
from service.db.engine import clock
from service.db.tables import Adapter, Event, Webhook, WebhookCursor, WebhookDelivery
from service.errors import NotFound, TooMany
from service.store.ids import new_id

MOST = 20
"""Endpoints of one tenant."""


def create(s: Session, tenant_id: str, url: str, events: list[str]) -> Webhook:
    """Sends what happens from now on."""
    have = s.scalar(select(func.count()).select_from(Webhook).where(Webhook.tenant_id == tenant_id)) or 0
    if have >= MOST:
        raise TooMany(f"You have {MOST} webhooks, the most allowed: delete one first.", retry_after=60)
    made = Webhook(
        id=new_id("wh"), tenant_id=tenant_id, url=url, events=sorted(set(events)), generation=1, created_at=clock(s)
    )
    s.add(made)
    s.flush()
    for adapter in s.execute(select(Adapter.id, Adapter.events_n).where(Adapter.tenant_id == tenant_id)):
        s.add(WebhookCursor(webhook_id=made.id, adapter_id=adapter.id, n=adapter.events_n))
    return made


def of_tenant(s: Session, tenant_id: str, webhook_id: str) -> Webhook:
    found = s.get(Webhook, webhook_id)
    if found is None or found.tenant_id != tenant_id:
        raise NotFound("You have no webhook of that id.", code="webhook_not_found", param="webhook")
    return found


def listing(s: Session, tenant_id: str) -> list[Webhook]:
    query = select(Webhook).where(Webhook.tenant_id == tenant_id).order_by(Webhook.created_at, Webhook.id)
    return list(s.scalars(query))


def delete(s: Session, webhook: Webhook) -> None:
    """With all that was to be delivered. An attempt that runs at this moment ends by itself."""
    s.execute(sql_delete(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook.id))
    s.execute(sql_delete(WebhookCursor).where(WebhookCursor.webhook_id == webhook.id))
    s.delete(webhook)


def rotate(s: Session, webhook: Webhook) -> None:
    """A new secret; the one before signs along for a day."""
    webhook.generation += 1
    webhook.rotated_at = clock(s)


def enable(webhook: Webhook) -> None:
    webhook.disabled = None


def deliveries(
    s: Session, webhook: Webhook, state: wire.DeliveryState | None, after: str | None, limit: int
) -> tuple[list[tuple[WebhookDelivery, Event]], bool]:
    """Newest first; True when there are more."""
    d = WebhookDelivery
    query = (
        select(d, Event)
        .join(Event, (Event.adapter_id == d.adapter_id) & (Event.n == d.n))
        .where(d.webhook_id == webhook.id)
    )
    if state is not None:
        query = query.where(d.state == state)
    if after is not None:
        mark = delivery_of(s, webhook, after)
        query = query.where((d.created_at < mark.created_at) | ((d.created_at == mark.created_at) & (d.id < mark.id)))
    rows = [(row[0], row[1]) for row in s.execute(query.order_by(d.created_at.desc(), d.id.desc()).limit(limit + 1))]
    return rows[:limit], len(rows) > limit


def delivery_of(s: Session, webhook: Webhook, delivery_id: str) -> WebhookDelivery:
    found = s.get(WebhookDelivery, delivery_id)
    if found is None or found.webhook_id != webhook.id:
        raise NotFound("This webhook has no delivery of that id.", code="delivery_not_found", param="delivery")
    return found


def redeliver(s: Session, delivery: WebhookDelivery) -> None:
    """Once more from the first attempt on, whatever became of it."""
    delivery.state, delivery.attempts, delivery.due_at, delivery.ended_at = "pending", 0, clock(s), None


def view(s: Session, webhook: Webhook, secret: str | None = None) -> wire.Webhook:
    status: Literal["active", "disabled"] = "disabled" if webhook.disabled else "active"
    return wire.Webhook(
        id=webhook.id,
        url=webhook.url,
        events=webhook.events,
        status=status,
        disabled_reason=webhook.disabled,
        pending=_count(s, webhook, "pending"),
        dead=_count(s, webhook, "dead"),
        secret=secret,
        created_at=int(webhook.created_at),
    )


def _count(s: Session, webhook: Webhook, state: str) -> int:
    d = WebhookDelivery
    query = select(func.count()).select_from(d).where(d.webhook_id == webhook.id, d.state == state)
    return s.scalar(query) or 0


def delivery_view(delivery: WebhookDelivery, event: Event) -> wire.WebhookDelivery:
    return wire.WebhookDelivery(
        id=delivery.id,
        type=event.type,
        job_id=event.job_id,
        state=delivery.state,
        attempts=delivery.attempts,
        next_attempt_at=int(delivery.due_at) if delivery.state == "pending" else None,
        status=delivery.status,
        error=delivery.error,
        created_at=int(delivery.created_at),
    )
