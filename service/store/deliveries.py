"""From the outbox to endpoints: what is to be delivered, whose turn it is, and what became of it.

Any number of processes may do this at once. A webhook's cursor in an adapter's outbox moves, and its deliveries appear,
in one transaction that starts from the cursor's old value; of two that do the same one fails and changes nothing. An
attempt begins by moving the delivery's `due_at` beyond its own end, in a transaction before anything is sent: others
leave it alone, and if the process dies between sending and writing down, it is due again by itself, under the same id.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.engine import clock
from service.db.tables import Adapter, Event, Webhook, WebhookCursor, WebhookDelivery
from service.store import events
from service.store.ids import new_id

AT_ONCE = 100
"""Events of one adapter that are taken over in one transaction."""
MOST_PENDING = 10_000
"""Of one endpoint; beyond it the outbox keeps them."""
ATTEMPT_SECONDS = 60.0
"""An attempt that has not ended by then is taken for lost. Longer than any attempt can take."""
ATTEMPTS = 10
FACTOR = 4
MOST_PAUSE = 86_400.0
KEPT_SECONDS = 7 * 86_400.0
"""How long what was delivered can be looked at."""


@dataclass(frozen=True)
class Due:
    """One attempt that has begun."""

    id: str
    attempt: int
    webhook_id: str
    url: str
    generations: tuple[int, ...]
    """Of the secrets that sign it."""
    adapter: str
    event: Event
    now: float


@dataclass(frozen=True)
class Result:
    """How an attempt ended."""

    status: int | None
    error: str | None = None
    retry_after: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def fan_out(s: Session) -> int:
    """Write the deliveries of one webhook's news in one adapter; how many events were dealt with."""
    found = s.execute(_NEWS).first()
    if found is None:
        return 0
    webhook, adapter_id, after = found
    news = events.since(s, adapter_id, after or 0, limit=AT_ONCE)
    wanted = [e.n for e in news if not webhook.events or e.type in webhook.events]
    if not _moved(s, webhook.id, adapter_id, after, news[-1].n):
        return 0  # another process has just done it
    rows = [{"id": new_id("msg"), "webhook_id": webhook.id, "adapter_id": adapter_id, "n": n} for n in wanted]
    if rows:
        now = clock(s)
        s.execute(insert(WebhookDelivery), [row | {"due_at": now, "created_at": now} for row in rows])
    return len(news)


_PENDING = (
    select(func.count())
    .select_from(WebhookDelivery)
    .where(WebhookDelivery.webhook_id == Webhook.id, WebhookDelivery.state == "pending")
    .correlate(Webhook)
    .scalar_subquery()
)
_NEWS = (
    select(Webhook, Adapter.id, WebhookCursor.n)
    .join(Adapter, Adapter.tenant_id == Webhook.tenant_id)
    .outerjoin(WebhookCursor, and_(WebhookCursor.webhook_id == Webhook.id, WebhookCursor.adapter_id == Adapter.id))
    .where(Webhook.disabled.is_(None), Adapter.events_n > func.coalesce(WebhookCursor.n, 0), _PENDING < MOST_PENDING)
    .limit(1)
)


def _moved(s: Session, webhook_id: str, adapter_id: str, old: int | None, new: int) -> bool:
    c = WebhookCursor
    if old is not None:
        here = (c.webhook_id == webhook_id, c.adapter_id == adapter_id, c.n == old)
        return s.scalar(update(c).where(*here).values(n=new).returning(c.n)) is not None
    try:
        with s.begin_nested():
            s.execute(insert(c).values(webhook_id=webhook_id, adapter_id=adapter_id, n=new))
    except IntegrityError:
        return False
    return True


def begin(s: Session, *, busy: Collection[str], limit: int) -> list[Due]:
    """Begin attempts: at most one endpoint's `limit`, of one that is not `busy` in this process; oldest first."""
    d, now = WebhookDelivery, clock(s)
    due = (d.state == "pending", d.due_at <= now)
    first = (
        select(d.webhook_id)
        .join(Webhook, Webhook.id == d.webhook_id)
        .where(*due, Webhook.disabled.is_(None), d.webhook_id.not_in(busy))
        .order_by(d.due_at)
        .limit(1)
    )
    webhook = s.get(Webhook, s.scalar(first) or "")
    if webhook is None:
        return []
    query = (
        select(d, Event, Adapter.name)
        .join(Event, (Event.adapter_id == d.adapter_id) & (Event.n == d.n))
        .join(Adapter, Adapter.id == d.adapter_id)
        .where(*due, d.webhook_id == webhook.id)
        .order_by(d.due_at, d.adapter_id, d.n)
        .limit(limit)
        .with_for_update(skip_locked=True, of=d)
    )
    return [_begun(webhook, row[0], row[1], row[2], now) for row in s.execute(query)]


def _begun(webhook: Webhook, delivery: WebhookDelivery, event: Event, adapter: str, now: float) -> Due:
    delivery.attempts += 1
    delivery.due_at = now + ATTEMPT_SECONDS
    both = webhook.rotated_at is not None and now < webhook.rotated_at + 86_400
    generations = (webhook.generation, webhook.generation - 1) if both else (webhook.generation,)
    return Due(delivery.id, delivery.attempts, webhook.id, webhook.url, generations, adapter, event, now)


def record(s: Session, due: Due, result: Result, backoff: float) -> None:
    """Write down how the attempt ended, unless a later one has begun, or the webhook is gone."""
    delivery = s.get(WebhookDelivery, due.id, with_for_update=True)
    if delivery is None or delivery.attempts != due.attempt or delivery.state != "pending":
        return
    now = clock(s)
    delivery.status, delivery.error = result.status, result.error[:256] if result.error else None
    if result.ok:
        delivery.state, delivery.ended_at = "delivered", now
    elif delivery.attempts >= ATTEMPTS or result.status == 410:
        delivery.state, delivery.ended_at = "dead", now
    else:
        pause = min(backoff * FACTOR ** (delivery.attempts - 1), MOST_PAUSE) * random.uniform(0.8, 1.0)  # noqa: S311
        delivery.due_at = now + max(pause, min(result.retry_after, MOST_PAUSE))
    if result.status == 410:
        s.execute(update(Webhook).where(Webhook.id == due.webhook_id).values(disabled="gone"))


def tidy(s: Session) -> None:
    """Forget what was delivered long ago."""
    d = WebhookDelivery
    s.execute(delete(d).where(d.state == "delivered", d.ended_at < clock(s) - KEPT_SECONDS))
