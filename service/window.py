"""Does a remark fit beside its answer into the model's window? Refused at the door, with both lengths.

Standing feedback does not count: the worker leaves its oldest remarks out where there is no room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import api_schemas.feedback as wire
from service.engine_client import EngineClient
from service.errors import Unprocessable

TEMPLATE_TOKENS = 64
"""Room for the fixed words around a remark."""
MESSAGE_TOKENS = 16
COUNTED_AT_ONCE = 16


def bound(item: wire.FeedbackItem) -> int:
    """Most tokens that the teacher reads for this item, but for its stored answer.

    A byte-level tokenizer never makes more tokens than bytes: most items need no counting.
    """
    return _fixed(item) + sum(len(t.encode()) for t in _texts(item))


async def check(
    engine: EngineClient, model: str, window: int, request: wire.FeedbackRequest, doubtful: Mapping[int, int]
) -> None:
    """Raises Unprocessable for the first item whose prompt, remark and answer together exceed the window.

    `doubtful`: position of each item that has to be counted -> tokens of its stored answer.
    """
    turn = asyncio.Semaphore(COUNTED_AT_ONCE)

    async def count(item: wire.FeedbackItem) -> int:
        async with turn:
            return await engine.count_tokens(model, "\n\n".join(_texts(item)))

    counts = await asyncio.gather(*(count(request.items[n]) for n in doubtful))
    for (position, known), counted in sorted(zip(doubtful.items(), counts, strict=True)):
        needed = known + _fixed(request.items[position]) + counted
        if needed > window:
            raise Unprocessable(
                f"Prompt, feedback and answer need {needed} tokens, the model's window has {window}: shorten them.",
                code="context_length_exceeded",
                param=f"items.{position}",
            )


def _fixed(item: wire.FeedbackItem) -> int:
    return TEMPLATE_TOKENS + MESSAGE_TOKENS * len(item.messages or ())


def _texts(item: wire.FeedbackItem) -> list[str]:
    texts = [item.feedback, item.demonstration or "", *(m.text for m in item.messages or ()), item.response or ""]
    return [t for t in texts if t]
