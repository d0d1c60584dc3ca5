"""Feedback: accepted whole or not at all, in the adapter's order, once per idempotency key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

import api_schemas.feedback as wire
from api_schemas.jobs import JobKind
from api_schemas.training import ResolvedTraining, TrainingSettings, resolve
from service.db.tables import Adapter, Batch, Item, Job
from service.errors import Conflict, Gone, NotFound, Unprocessable
from service.store import adapters, rollouts
from service.store.ids import new_id
from service.store.targets import Target

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def digest(said: bytes) -> str:
    """Of a `meaning`: what a retry is recognised by."""
    return hashlib.sha256(said).hexdigest()


def meaning(request: wire.FeedbackRequest, kind: JobKind = "train") -> bytes:
    """JSON in ASCII, all defaults filled in: order of keys and white space do not count."""
    fields = request.model_dump(mode="json")
    if kind != "train":
        fields["kind"] = kind
    if not request.priority:  # as hashed before there was one, nor of a user
        del fields["priority"]
    for item in fields["items"]:
        if item["user"] is None:
            del item["user"]
    return _CANONICAL.encode(fields).encode()


def check_body(known: str, sent: str) -> None:
    """Raises Conflict when the hash stored with an Idempotency-Key is not that of the body it came with now, and Gone
    when some of the stored one was erased: nobody knows any more what it was."""
    if not known:
        raise Gone(
            "Feedback of this Idempotency-Key was erased: use a new key for new feedback.",
            code="feedback_erased",
            param="Idempotency-Key",
        )
    if known != sent:
        raise Conflict(
            "This Idempotency-Key was used for another body: use a new key for new feedback.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )


def named_answers(
    tenant_id: str, request: wire.FeedbackRequest, stored: Mapping[str, rollouts.Known]
) -> dict[str, rollouts.Known]:
    """The stored answers that the items name, by id. Raises NotFound; Unprocessable for text completions, which have no
    user turn that a teacher could be told a remark in."""
    found = {}
    for position, item in enumerate(request.items):
        if (name := rollouts.named_by(item)) is None:
            continue
        answer = stored.get(name)
        if answer is None or answer.tenant_id != tenant_id:
            raise rollouts.not_found(name, position)
        if not answer.conversation:
            raise Unprocessable(
                "This is a text completion: feedback needs an answer of a conversation.",
                code="not_a_conversation",
                param=f"items.{position}.completion_id",
            )
        found[name] = answer
    return found


def target_adapter(
    tenant_id: str,
    request: wire.FeedbackRequest,
    answers: Mapping[str, rollouts.Known],
    candidates: Mapping[str, Target],
) -> Target:
    """The adapter that learns: named, or the one that gave the answers. Answers of another adapter are refused."""
    adapter = _chosen(tenant_id, request, answers, candidates)
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


def _chosen(
    tenant_id: str,
    request: wire.FeedbackRequest,
    answers: Mapping[str, rollouts.Known],
    candidates: Mapping[str, Target],
) -> Target:
    given = {a.adapter_id for a in answers.values() if a.adapter_id is not None}
    if request.adapter is not None:
        for adapter in candidates.values():
            if adapter.tenant_id == tenant_id and adapter.name == request.adapter and adapter.deleted_at is None:
                return adapter
        raise adapters.not_found(request.adapter)
    if len(given) != 1:
        raise Unprocessable(
            "The answers do not name one adapter: say which one learns.", code="adapter_required", param="adapter"
        )
    adapter = candidates[given.pop()]
    if adapter.deleted_at is not None:
        raise NotFound(f"Adapter '{adapter.name}' was deleted.", code="adapter_not_found", param="adapter")
    return adapter


def resolved_training(of_adapter: TrainingSettings, of_batch: TrainingSettings | None = None) -> ResolvedTraining:
    """All settings filled in. Raises Unprocessable for a combination that trains nothing."""
    try:
        return resolve(of_adapter, of_batch)
    except ValidationError as error:
        raise Unprocessable(
            error.errors()[0]["msg"].removeprefix("Value error, "), code="invalid_training", param="training"
        ) from error


def batch_of_tenant(s: Session, tenant_id: str, batch_id: str) -> Batch:
    batch = s.get(Batch, batch_id)
    if batch is None or batch.tenant_id != tenant_id:
        raise NotFound("You have no feedback batch of that id.", code="batch_not_found", param="batch")
    return batch


def items_of(s: Session, batch_ids: Sequence[str], *, at: float | None = None) -> list[Item]:
    """What there is to learn, batch after batch in the order given, each in the order of its submission.

    Without what was erased; with what was not yet at the time `at`.
    """
    there = Item.erased_at.is_(None) if at is None else or_(Item.erased_at.is_(None), Item.erased_at > at)
    place = {batch_id: n for n, batch_id in enumerate(batch_ids)}
    rows = s.scalars(select(Item).where(Item.batch_id.in_(batch_ids), there))
    return sorted(rows, key=lambda item: (place[item.batch_id], item.position))


def view(s: Session, batch: Batch, *, with_items: bool) -> wire.FeedbackBatch:
    # The newest: a rebuild trains a batch once more.
    jobs = select(Job).where(Job.batch_id == batch.id)
    job = s.scalars(jobs.order_by(Job.seq.desc()).limit(1)).one()
    items = s.scalars(select(Item).where(Item.batch_id == batch.id).order_by(Item.position)) if with_items else ()
    return wire.FeedbackBatch(
        id=batch.id,
        adapter=s.get_one(Adapter, batch.adapter_id).name,
        job_id=job.id,
        status=job.state,
        item_count=batch.item_count,
        version=job.version_n,
        created_at=int(batch.created_at),
        items=[_item_view(i) for i in items] if with_items else None,
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
        erased=item.erased_by,
    )


def item_row(
    batch_id: str, position: int, item: wire.FeedbackItem, person: str | None, kind: JobKind
) -> dict[str, Any]:
    """For the table of items. `person`: what is kept of a tenant's `user`. What is only previewed never stands."""
    return {
        "id": new_id("item"),
        "batch_id": batch_id,
        "position": position,
        "rollout_id": rollouts.named_by(item),
        "messages": json.dumps([m.plain() for m in item.messages]) if item.messages is not None else None,
        "response": item.response,
        "feedback": item.feedback,
        "demonstration": item.demonstration,
        "standing": item.standing and kind != "preview",
        "person": person,
    }
