"""Rollouts: answers kept with the engine's own token ids and log-probs, to be learnt from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Dialect, FromClause, Integer, func, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

import api_schemas.feedback as wire
from service.db.engine import db_now
from service.db.prepared import Prepared, Statement
from service.db.tables import Base, Rollout
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
    person: str | None = None
    """Pseudonym of the caller's `user`."""


def id_of(completion_id: str, choice: int) -> str:
    """A rollout's id: the completion's own for its first choice, with the choice's number behind it for others."""
    return f"{completion_id}-{choice}" if choice else completion_id


def named_by(item: wire.FeedbackItem) -> str | None:
    """The rollout that an item is about; None for an answer given in full."""
    return None if item.completion_id is None else id_of(item.completion_id, item.choice)


def completion_of(rollout_id: str) -> tuple[str, int]:
    """The completion and the choice that `id_of` made this id from."""
    kind, _, rest = rollout_id.partition("-")
    name, _, choice = rest.partition("-")
    return (f"{kind}-{name}", int(choice)) if choice.isdecimal() and choice.isascii() else (rollout_id, 0)


def add_all(s: Session, answers: Sequence[Answer]) -> None:
    """Rows made without the mapper and without a question for the time: 0.9 ms of computing instead of 1.6."""
    for answer in answers:
        if answer.logprobs is not None and len(answer.logprobs) != len(answer.response_token_ids):
            raise ValueError("one log-prob per response token, or none at all")
    s.execute(_INSERT, [vars(answer) for answer in answers])


@dataclass(frozen=True)
class Known:
    """What feedback has to know of a stored answer."""

    tenant_id: str
    adapter_id: str | None
    base_model: str
    conversation: bool
    """False: a text completion."""
    tokens: int
    """Of prompt and response together."""


def known(connection: Connection, ids: Collection[str]) -> dict[str, Known]:
    """Those of the ids that are stored, whoever they belong to; texts and tokens stay in the database."""
    if not ids:
        return {}
    return {row[0]: Known(*row[1:]) for row in _KNOWN.run(connection, [{"id": n} for n in sorted(ids)])}


def _length(column: ColumnElement[Any]) -> ColumnElement[int]:
    return func.json_array_length(column, type_=Integer)


_ROLLOUTS = Base.metadata.tables[Rollout.__tablename__]
_INSERT = insert(_ROLLOUTS).values(created_at=db_now())


def _known(_: Dialect, wanted: FromClause) -> Statement:
    c = _ROLLOUTS.c
    tokens = _length(c.prompt_token_ids) + _length(c.response_token_ids)
    columns = (c.id, c.tenant_id, c.adapter_id, c.base_model, _length(c.messages) > 0, tokens)
    return select(*columns).where(c.id.in_(select(wanted.c.id)))


_KNOWN = Prepared(_known, _ROLLOUTS.c.id)


def not_found(rollout_id: str, position: int) -> NotFound:
    """Absent or another tenant's. `position`: of the item that names it."""
    completion, choice = completion_of(rollout_id)
    which = f"choice {choice} of completion '{completion}'" if choice else f"completion '{completion}'"
    return NotFound(
        f"No {which} of yours is stored.", code="completion_not_found", param=f"items.{position}.completion_id"
    )
