"""Feedback: accepted whole or not at all, in the adapter's order, once per idempotency key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.orm import Session

import api_schemas.feedback as wire
from api_schemas.training import ResolvedTraining, TrainingSettings, resolve
from service.db.engine import clock
from service.db.tables import Adapter, Batch, Item, Job, Rollout, Tenant
from service.errors import Conflict, NotFound, TooMany, Unprocessable
from service.store import adapters, rollouts
from service.store.ids import new_id


def body_hash(request: wire.FeedbackRequest) -> str:
    """Of the request's meaning, not of its bytes: order of keys and white space do not count."""
    body = json.dumps(request.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()


def replayed(s: Session, tenant_id: str, key: str, digest: str) -> Batch | None:
    """The batch already stored under this key, if any. Raises Conflict when its body was another."""
    batch = s.scalar(select(Batch).where(Batch.tenant_id == tenant_id, Batch.idempotency_key == key))
    if batch is not None and batch.body_hash != digest:
        raise Conflict(
            "This Idempotency-Key was used for another body: use a new key for new feedback.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return batch


def submit(
    s: Session,
    tenant_id: str,
    request: wire.FeedbackRequest,
    *,
    idempotency_key: str | None,
    max_queued: int,
) -> tuple[Batch, bool]:
    """Store the batch and queue its job. The flag is True when the key had been used for the same body before."""
    digest = body_hash(request)
    s.execute(
        select(Tenant.id).where(Tenant.id == tenant_id).with_for_update()
    )  # one key, one batch: also in PostgreSQL
    if idempotency_key is not None and (known := replayed(s, tenant_id, idempotency_key, digest)):
        return known, True
    answers = named_answers(s, tenant_id, request)
    adapter = target_adapter(s, tenant_id, request, answers)
    if adapter.open_jobs >= max_queued:
        raise TooMany(f"{adapter.open_jobs} batches wait for '{adapter.name}': send more later.", retry_after=30)
    batch = Batch(
        id=new_id("fb"),
        tenant_id=tenant_id,
        adapter_id=adapter.id,
        idempotency_key=idempotency_key,
        body_hash=digest,
        training=resolved_training(TrainingSettings.model_validate(adapter.training), request.training).model_dump(),
        item_count=len(request.items),
        created_at=clock(s),
    )
    s.add(batch)
    s.flush()
    s.add_all(_item(batch.id, position, item) for position, item in enumerate(request.items))
    enqueue(s, adapter, batch)
    return batch, False


def named_answers(s: Session, tenant_id: str, request: wire.FeedbackRequest) -> dict[str, Rollout]:
    """The rollouts that the items name, by id. Raises NotFound; Unprocessable for text completions, which have no
    user turn that a teacher could be told a remark in."""
    found = rollouts.of_tenant(s, tenant_id, [(n, i) for n, i in enumerate(map(rollouts.named_by, request.items)) if i])
    for position, item in enumerate(request.items):
        answer = found.get(rollouts.named_by(item) or "")
        if answer is not None and not answer.messages:
            raise Unprocessable(
                "This is a text completion: feedback needs an answer of a conversation.",
                code="not_a_conversation",
                param=f"items.{position}.completion_id",
            )
    return found


def target_adapter(
    s: Session, tenant_id: str, request: wire.FeedbackRequest, answers: Mapping[str, Rollout]
) -> Adapter:
    """The adapter that learns: named, or the one that gave the answers. Answers of another adapter are refused."""
    given = {r.adapter_id for r in answers.values()} - {None}
    if request.adapter is not None:
        adapter = adapters.by_name(s, tenant_id, request.adapter)
    elif len(given) == 1:
        found = s.get_one(Adapter, given.pop())
        if found.deleted_at is not None:
            raise NotFound(f"Adapter '{found.name}' was deleted.", code="adapter_not_found", param="adapter")
        adapter = found
    else:
        raise Unprocessable(
            "The answers do not name one adapter: say which one learns.", code="adapter_required", param="adapter"
        )
    for position, item in enumerate(request.items):
        answer = answers.get(rollouts.named_by(item) or "")
        if answer is not None and (
            answer.adapter_id not in (None, adapter.id) or answer.base_model != adapter.base_model
        ):
            raise Unprocessable(
                f"This answer was not given by '{adapter.name}' or its base model.",
                code="adapter_mismatch",
                param=f"items.{position}.completion_id",
            )
    return adapter


def resolved_training(of_adapter: TrainingSettings, of_batch: TrainingSettings | None = None) -> ResolvedTraining:
    """All settings filled in. Raises Unprocessable for a combination that trains nothing."""
    try:
        return resolve(of_adapter, of_batch)
    except ValidationError as error:
        raise Unprocessable(
            error.errors()[0]["msg"].removeprefix("Value error, "), code="invalid_training", param="training"
        ) from error


def enqueue(s: Session, adapter: Adapter, batch: Batch) -> Job:
    """The next job of its adapter. The row is updated first: sequence order is commit order."""
    seq = s.execute(
        update(Adapter)
        .where(Adapter.id == adapter.id)
        .values(next_seq=Adapter.next_seq + 1, open_jobs=Adapter.open_jobs + 1)
        .returning(Adapter.next_seq)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    job = Job(
        id=new_id("job"),
        tenant_id=batch.tenant_id,
        adapter_id=adapter.id,
        batch_id=batch.id,
        seq=seq - 1,
        created_at=batch.created_at,
    )
    s.add(job)
    s.flush()
    return job


def batch_of_tenant(s: Session, tenant_id: str, batch_id: str) -> Batch:
    batch = s.get(Batch, batch_id)
    if batch is None or batch.tenant_id != tenant_id:
        raise NotFound("You have no feedback batch of that id.", code="batch_not_found", param="batch")
    return batch


def items_of(s: Session, batch_ids: Sequence[str]) -> list[Item]:
    """In the order of submission within each batch."""
    rows = s.scalars(select(Item).where(Item.batch_id.in_(batch_ids)).order_by(Item.batch_id, Item.position))
    return list(rows)


def view(s: Session, batch: Batch, *, with_items: bool) -> wire.FeedbackBatch:
    job = s.scalars(select(Job).where(Job.batch_id == batch.id)).one()
    items = [_item_view(i) for i in (items_of(s, [batch.id]) if with_items else [])]
    return wire.FeedbackBatch(
        id=batch.id,
        adapter=s.get_one(Adapter, batch.adapter_id).name,
        job_id=job.id,
        status=job.state,
        item_count=batch.item_count,
        version=job.version_n,
        created_at=int(batch.created_at),
        items=items if with_items else None,
    )


def _item_view(item: Item) -> wire.FeedbackItemView:
    completion, choice = rollouts.completion_of(item.rollout_id) if item.rollout_id else (None, 0)
    return wire.FeedbackItemView(
        id=item.id,
        completion_id=completion,
        choice=choice,
        feedback=item.feedback,
        demonstration=item.demonstration,
        standing=item.standing,
    )


def _item(batch_id: str, position: int, item: wire.FeedbackItem) -> Item:
    return Item(
        id=new_id("item"),
        batch_id=batch_id,
        position=position,
        rollout_id=rollouts.named_by(item),
        messages=[m.plain() for m in item.messages] if item.messages is not None else None,
        response=item.response,
        feedback=item.feedback,
        demonstration=item.demonstration,
        standing=item.standing,
    )
