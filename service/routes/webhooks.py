"""Webhooks: where events of a tenant are posted."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

import api_schemas.webhooks as wire
from api_schemas.jobs import Page
from service.auth import AdaptersReader, AdaptersWriter, Ctx, guarded
from service.routes.ids import PathId, QueryId
from service.store import webhooks
from service.webhooks.signing import secret_of

router = guarded(tags=["webhooks"])


@router.post("/v1/webhooks", status_code=201)
def create_webhook(request: wire.WebhookCreate, context: Ctx, tenant: AdaptersWriter) -> wire.Webhook:
    """Post what happens from now on to this URL. The answer holds the secret, this one time."""
    context.settings.webhook_policy.check_url(request.url)
    with context.database.write() as s:
        made = webhooks.create(s, tenant, request.url, list(request.events))
        return webhooks.view(s, made, secret_of(context.keys, made.id, made.generation))


@router.get("/v1/webhooks")
def list_webhooks(context: Ctx, tenant: AdaptersReader) -> Page[wire.Webhook]:
    """All of them, oldest first."""
    with context.database.read() as s:
        return Page[wire.Webhook](data=[webhooks.view(s, w) for w in webhooks.listing(s, tenant)])


@router.get("/v1/webhooks/{webhook}")
def get_webhook(webhook: PathId, context: Ctx, tenant: AdaptersReader) -> wire.Webhook:
    with context.database.read() as s:
        return webhooks.view(s, webhooks.of_tenant(s, tenant, webhook))


@router.delete("/v1/webhooks/{webhook}")
def delete_webhook(webhook: PathId, context: Ctx, tenant: AdaptersWriter) -> wire.WebhookDeleted:
    """Nothing is sent any more."""
    with context.database.write() as s:
        webhooks.delete(s, webhooks.of_tenant(s, tenant, webhook))
    return wire.WebhookDeleted(id=webhook)


@router.post("/v1/webhooks/{webhook}/rotate")
def rotate_secret(webhook: PathId, context: Ctx, tenant: AdaptersWriter) -> wire.Webhook:
    """A new secret, shown this one time; for a day deliveries are signed with the one before as well."""
    with context.database.write() as s:
        row = webhooks.of_tenant(s, tenant, webhook)
        webhooks.rotate(s, row)
        s.flush()
        return webhooks.view(s, row, secret_of(context.keys, row.id, row.generation))


@router.post("/v1/webhooks/{webhook}/enable")
def enable_webhook(webhook: PathId, context: Ctx, tenant: AdaptersWriter) -> wire.Webhook:
    """Send again, what happened meanwhile first, after the endpoint had answered 410."""
    with context.database.write() as s:
        row = webhooks.of_tenant(s, tenant, webhook)
        webhooks.enable(row)
        s.flush()
        return webhooks.view(s, row)


@router.get("/v1/webhooks/{webhook}/deliveries")
def list_deliveries(
    webhook: PathId,
    context: Ctx,
    tenant: AdaptersReader,
    state: wire.DeliveryState | None = None,
    after: QueryId = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[wire.WebhookDelivery]:
    """Newest first; `dead` are those that were given up."""
    with context.database.read() as s:
        rows, more = webhooks.deliveries(s, webhooks.of_tenant(s, tenant, webhook), state, after, limit)
        return Page[wire.WebhookDelivery](data=[webhooks.delivery_view(d, e) for d, e in rows], has_more=more)


@router.post("/v1/webhooks/{webhook}/deliveries/{delivery}/redeliver", status_code=202)
def redeliver(webhook: PathId, delivery: PathId, context: Ctx, tenant: AdaptersWriter) -> wire.Webhook:
    """Send it once more, under the same id."""
    with context.database.write() as s:
        row = webhooks.of_tenant(s, tenant, webhook)
        webhooks.redeliver(s, webhooks.delivery_of(s, row, delivery))
        s.flush()
        return webhooks.view(s, row)
