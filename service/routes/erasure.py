"""What users said is erased; and an adapter is built anew without it."""

from __future__ import annotations

import api_schemas.erasure as wire
from api_schemas.base import AdapterName
from service.auth import AdaptersWriter, Ctx, FeedbackTenant, guarded
from service.context import Context
from service.errors import Unavailable
from service.routes.ids import PathId
from service.store import adapters, chosen, erasure, rebuild, rollouts, scrubbing

router = guarded(tags=["erasure"])


@router.delete("/v1/feedback/items/{item}")
def erase_item(item: PathId, context: Ctx, tenant: FeedbackTenant) -> wire.Erasure:
    """One remark, and the answer it is about. Safe to repeat."""
    with context.database.read() as s:
        row = chosen.item_of_tenant(s, tenant, item)
    return _erase(context, tenant, chosen.items([row.id]), erasure.Erased(items={row.id}, batches={row.batch_id}))


@router.delete("/v1/feedback/{batch}")
def erase_batch(batch: PathId, context: Ctx, tenant: FeedbackTenant) -> wire.Erasure:
    """A whole batch, remarks and answers. Safe to repeat."""
    with context.database.read() as s:
        ids = chosen.item_ids(s, tenant, batch)
    return _erase(context, tenant, chosen.items(ids), erasure.Erased(items=set(ids), batches={batch}))


@router.delete("/v1/chat/completions/{completion}")
def erase_completion(completion: PathId, context: Ctx, tenant: FeedbackTenant) -> wire.CompletionDeleted:
    """An answer with all its choices, and every remark on it."""
    with context.database.read() as s:
        ids = chosen.choices_of(s, tenant, completion)
    erased = _erase(context, tenant, chosen.answers(ids), erasure.Erased())
    return wire.CompletionDeleted(id=completion, perennial=erased)


@router.delete("/v1/users/{user:path}")
def erase_user(user: PathId, context: Ctx, tenant: FeedbackTenant) -> wire.Erasure:
    """All answers that were asked for with this `user`, all remarks on them, and all remarks sent with it."""
    choice = chosen.of_person(tenant, context.keys.pseudonym(tenant, user))
    return _erase(context, tenant, choice, erasure.Erased())


def _erase(context: Context, tenant: str, choice: erasure.Choice, done: erasure.Erased) -> wire.Erasure:
    erasure.erase_all(context.database, tenant, choice, done)
    with context.database.read() as s:
        learners = erasure.learners(s, done.batches)
    context.work.ring()  # what was fenced is queued again
    return wire.Erasure(
        items=sorted(done.items),
        completions=_completions(done.rollouts),
        kept_completions=_completions(done.kept_rollouts),
        cancelled_jobs=sorted(done.cancelled_jobs),
        learnt_by=[wire.Learners(adapter=name, versions=sorted(found)) for name, found in sorted(learners.items())],
        scrubbed=_scrubbed(context),
    )


def _completions(rollout_ids: set[str]) -> list[str]:
    return sorted({rollouts.completion_of(r)[0] for r in rollout_ids})


def _scrubbed(context: Context) -> bool:
    """Whether the files are clean now. Where that has to wait, the publisher's passes see to it."""
    if not context.settings.scrub_at_once:
        with context.database.read() as s:
            return scrubbing.due(s) is None
    try:
        return scrubbing.scrub(context.database)
    except Unavailable:
        return False


@router.post("/v1/adapters/{adapter}/rebuild", status_code=202)
def rebuild_adapter(
    adapter: AdapterName, context: Ctx, tenant: AdaptersWriter, request: wire.RebuildRequest | None = None
) -> wire.Rebuild:
    """Go back to the last version that never saw what was erased, and train on what is left, in order."""
    wanted = request or wire.RebuildRequest()
    with context.database.write() as s:
        row = adapters.locked(s, adapters.by_name(s, tenant, adapter).id)
        made = rebuild.start(s, row, hold=wanted.serve_meanwhile == "current")
    context.work.ring()
    context.publisher.bell.ring()
    return wire.Rebuild(
        adapter=adapter,
        from_version=made.origin,
        replaces=made.replaced,
        job_ids=made.job_ids,
        serve_meanwhile=wanted.serve_meanwhile,
    )
