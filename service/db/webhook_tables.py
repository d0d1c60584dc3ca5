"""The tables of webhooks: endpoints, how far each has come in the outbox, and what is to be delivered."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, Id

PENDING = text("state = 'pending'")


class Webhook(Base):
    """An endpoint of a tenant. Its secret is derived, not stored (`service.webhooks.signing`)."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_tenant_id", "tenant_id"),)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    url: Mapped[str] = mapped_column(String(2000))
    events: Mapped[list[str]]
    """Types that are sent; empty: all."""
    generation: Mapped[int] = mapped_column(default=1)
    """Of its secret."""
    rotated_at: Mapped[float | None]
    disabled: Mapped[str | None] = mapped_column(String(64))
    """Why nothing is sent; None: all is well."""
    created_at: Mapped[float]


class WebhookCursor(Base):
    """Up to which event of an adapter the deliveries of a webhook are written; without a row: none."""

    __tablename__ = "webhook_cursors"
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    n: Mapped[int]


class WebhookDelivery(Base):
    """One event for one endpoint: pending -> delivered | dead; dead -> pending when somebody says so."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        # The same event is never two deliveries of one endpoint.
        UniqueConstraint("webhook_id", "adapter_id", "n"),
        ForeignKeyConstraint(["adapter_id", "n"], ["events.adapter_id", "events.n"]),
        Index("ix_webhook_deliveries_due", "webhook_id", "due_at", sqlite_where=PENDING, postgresql_where=PENDING),
        CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state_known"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    """Also the `webhook-id` header: the same with each attempt."""
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    adapter_id: Mapped[str] = mapped_column(Id)
    n: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[float]
    """Not before. Whoever begins an attempt moves it beyond the attempt's end: if that dies, it is due again."""
    status: Mapped[int | None]
    """Of the last answer."""
    error: Mapped[str | None] = mapped_column(String(256))
    created_at: Mapped[float]
    ended_at: Mapped[float | None]
