"""Webhooks: endpoints of a tenant, and what became of each delivery."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from api_schemas.base import Request, Response

EventName = Literal[
    "job.queued",
    "job.running",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "version.created",
    "version.published",
    "version.rejected",
    "adapter.promoted",
    "adapter.paused",
    "adapter.resumed",
    "adapter.blocked",
    "adapter.rebuilding",
    "adapter.deleted",
]
DeliveryState = Literal["pending", "delivered", "dead"]


class WebhookCreate(Request):
    url: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    """https, a host that the operator allows."""
    events: Annotated[list[EventName], Field(max_length=32)] = []
    """Which are sent; empty: all."""


class Webhook(Response):
    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    status: Literal["active", "disabled"]
    disabled_reason: str | None = None
    """E.g. `gone`: the endpoint answered 410."""
    pending: int = 0
    dead: int = 0
    """Deliveries that were given up."""
    secret: str | None = None
    """`whsec_...`, shown when it is made and never again."""
    created_at: int


class WebhookDeleted(Response):
    id: str
    object: Literal["webhook"] = "webhook"
    deleted: bool = True


class WebhookDelivery(Response):
    id: str
    """Also the `webhook-id` header, the same with each attempt."""
    object: Literal["webhook.delivery"] = "webhook.delivery"
    type: str
    job_id: str | None = None
    state: DeliveryState
    attempts: int
    next_attempt_at: int | None = None
    """Unix seconds; of what is pending."""
    status: int | None = None
    """HTTP status of the last answer."""
    error: str | None = None
    """Why the last attempt failed, where there was no answer."""
    created_at: int
