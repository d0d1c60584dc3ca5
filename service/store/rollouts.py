"""Rollouts: answers kept with the engine's own token ids and log-probs, to be learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.engine import clock
from service.db.tables import Rollout
from service.errors import NotFound


@dataclass(frozen=True)
class Answer:
    """One finished answer. `logprobs` has one natural log per response token, or is None: never padded."""

    id: str
    tenant_id: str
    adapter_id: str | None
    base_model: str
    version_n: int
    messages: list[dict[str, Any]]
    """Empty for a text completion."""
    tools: list[dict[str, Any]] | None
    response: str
    """The text alone; `reply` has reasoning and tool calls."""
    reply: dict[str, Any] | None
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float] | None
    logprobs_mode: str
    sampling: dict[str, Any]
    finish_reason: str | None


def id_of(completion_id: str, choice: int) -> str:
    """A rollout's id: the completion's own for its first choice, with the choice's number behind it for others."""
    return f"{completion_id}-{choice}" if choice else completion_id


def add(s: Session, answer: Answer) -> None:
    if answer.logprobs is not None and len(answer.logprobs) != len(answer.response_token_ids):
        raise ValueError("one log-prob per response token, or none at all")
    s.add(Rollout(**vars(answer), created_at=clock(s)))


def of_tenant(s: Session, tenant_id: str, ids: Sequence[str]) -> dict[str, Rollout]:
    """All of `ids`, by id. Raises NotFound for the first that is absent or another tenant's."""
    rows = s.scalars(select(Rollout).where(Rollout.tenant_id == tenant_id, Rollout.id.in_(set(ids))))
    found = {r.id: r for r in rows}
    for position, wanted in enumerate(ids):
        if wanted not in found:
            raise NotFound(
                f"No completion '{wanted}' of yours is stored.",
                code="completion_not_found",
                param=f"items.{position}.completion_id",
            )
    return found
