"""A lease as the worker gets it: the items of its jobs with the answers that they are about."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

import api_schemas.worker as wire
from api_schemas.training import LoraSettings, ResolvedTraining
from service.db.tables import Adapter, Batch, Item, Job, Rollout, Run, Version
from service.store import feedback
from service.store.rules import Rules


def lease(s: Session, adapter: Adapter, run: Run, jobs: Sequence[Job], rules: Rules) -> wire.Lease:
    """All that a worker needs for this run, items in the order of their jobs."""
    batch_ids = [job.batch_id for job in jobs]
    training = ResolvedTraining.model_validate(s.get_one(Batch, batch_ids[0]).training)
    parent = s.get_one(Version, (adapter.id, run.parent_n)) if run.parent_n else None
    return wire.Lease(
        kind="preview" if jobs[0].kind == "preview" else "train",
        run_id=run.id,
        token=run.token,
        lease_seconds=rules.lease_seconds,
        adapter_id=adapter.id,
        adapter=adapter.name,
        base_model=adapter.base_model,
        lora=LoraSettings.model_validate(adapter.lora),
        training=training,
        seed=run.seed,
        parent=_parent(parent, rules) if parent else None,
        standing_feedback=list(parent.standing) if parent else [],
        files="http" if rules.files_over_http else "shared",
        canary_prompt=rules.canary_prompt,
        batch_ids=batch_ids,
        items=[_leased_item(s, item) for item in feedback.items_of(s, batch_ids)],
    )


def _parent(version: Version, rules: Rules) -> wire.ParentVersion:
    files = [wire.FileEntry.model_validate(f) for f in version.files] if rules.files_over_http else []
    return wire.ParentVersion(version=version.n, uri=version.uri, digest=version.digest, files=files)


def seed_of(s: Session, jobs: Sequence[Job]) -> int:
    """A retry of the same jobs trains the same way: the seed follows the jobs, not the attempt."""
    if jobs[0].seed is not None:
        return jobs[0].seed
    given = ResolvedTraining.model_validate(s.get_one(Batch, jobs[0].batch_id).training).seed
    return given if given is not None else jobs[0].seq


def _leased_item(s: Session, item: Item) -> wire.LeasedItem:
    rollout = s.get_one(Rollout, item.rollout_id) if item.rollout_id is not None else None
    return wire.LeasedItem(
        id=item.id,
        messages=rollout.messages if rollout else item.messages or [],
        tools=rollout.tools if rollout else None,
        response=rollout.response if rollout else item.response or "",
        prompt_token_ids=rollout.prompt_token_ids if rollout else None,
        response_token_ids=rollout.response_token_ids if rollout else None,
        behaviour_logprobs=rollout.logprobs if rollout else None,
        logprobs_mode=rollout.logprobs_mode if rollout else None,
        sampling=rollout.sampling if rollout else {},
        version=rollout.version_n if rollout else None,
        feedback=item.feedback,
        demonstration=item.demonstration,
        standing=item.standing,
    )
