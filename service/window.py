"""Does a remark fit beside its answer into the model's window? Refused at the door, with both lengths."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import anyio

import api_schemas.feedback as wire
from service.context import Context
from service.errors import Unprocessable
from service.store import feedback, rollouts

TEMPLATE_TOKENS = 64
"""Room for the fixed words around a remark."""
COUNTED_AT_ONCE = 16


@dataclass(frozen=True)
class _Pieces:
    """What the teacher reads for one item; `known` tokens have been counted by the engine already."""

    known: int
    texts: list[str]
    messages: int

    @property
    def fixed(self) -> int:
        """Tokens that need no counting: those known, and room for the template."""
        return self.known + TEMPLATE_TOKENS + 16 * self.messages


async def check_window(context: Context, tenant_id: str, request: wire.FeedbackRequest) -> None:
    """Raises Unprocessable for the first item whose prompt, remark and answer together exceed the window.

    Standing feedback does not count: the worker leaves its oldest remarks out where there is no room.
    """
    window = await context.engine.window(context.base_model)
    if window is None:
        return  # the worker checks again
    # A byte-level tokenizer never makes more tokens than bytes: most items need no counting.
    doubtful = {
        position: pieces
        for position, pieces in enumerate(await anyio.to_thread.run_sync(_pieces, context, tenant_id, request))
        if pieces.fixed + sum(len(t.encode()) for t in pieces.texts) > window
    }
    counts = await _counted(context, doubtful)
    for position in sorted(doubtful):
        if (counted := doubtful[position].fixed + counts[position]) > window:
            raise Unprocessable(
                f"Prompt, feedback and answer need {counted} tokens, the model's window has {window}: shorten them.",
                code="context_length_exceeded",
                param=f"items.{position}",
            )


async def _counted(context: Context, doubtful: Mapping[int, _Pieces]) -> dict[int, int]:
    """Tokens of each item's texts, several asked for at once."""
    turn = asyncio.Semaphore(COUNTED_AT_ONCE)

    async def count(pieces: _Pieces) -> int:
        async with turn:
            return await context.engine.count_tokens(context.base_model, "\n\n".join(pieces.texts))

    counts = await asyncio.gather(*(count(pieces) for pieces in doubtful.values()))
    return dict(zip(doubtful, counts, strict=True))


def _pieces(context: Context, tenant_id: str, request: wire.FeedbackRequest) -> list[_Pieces]:
    with context.database.read() as s:
        stored = feedback.named_answers(s, tenant_id, request)
        lengths = {r.id: len(r.prompt_token_ids) + len(r.response_token_ids) for r in stored.values()}
    return [_piece(item, lengths) for item in request.items]


def _piece(item: wire.FeedbackItem, lengths: dict[str, int]) -> _Pieces:
    texts = [item.feedback, item.demonstration or ""]
    messages = item.messages or []
    texts += [m.text for m in messages] + [item.response or ""]
    return _Pieces(lengths.get(rollouts.named_by(item) or "", 0), [t for t in texts if t], len(messages))
