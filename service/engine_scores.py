"""Log-probs of given tokens: each is drawn, as the only one that may be, behind those before it.

vLLM also says the log-probs of a prompt, in one request. But it takes one row per request for one row per token where
the adapter's part of the head is added: while others are answered that ends a CPU's engine (measured, 0.32.0), and on a
GPU that part is left out (vllm issues 16668, 51594). What is drawn goes the ordinary way; the values are the same ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from service.errors import EngineError

Json = dict[str, Any]
AT_ONCE = 8
"""Requests of one token that run side by side: others are answered meanwhile."""
Alternatives = dict[int, float]
"""Log-probs by token: of the one that was drawn, and of the likeliest."""
Draw = Callable[[list[int], list[int] | None], Awaitable[Alternatives]]
"""One token behind a prompt, none but the allowed ones, if any are named."""


def draw_payload(model: str, prompt: list[int], allowed: list[int] | None) -> Json:
    only = {} if allowed is None else {"allowed_token_ids": allowed}
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    } | only


def alternatives(answer: Json) -> Alternatives:
    """Raises LookupError, TypeError or ValueError for an answer that cannot be read."""
    shown = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): float(value) for token, value in shown.items()}


async def score(draw: Draw, mode: Literal["raw_logprobs", "processed_logprobs"], ids: list[int]) -> list[float]:
    """Of every token but the first, given those before it. Raises EngineError for an engine that draws others."""
    of = _raw if mode == "raw_logprobs" else _processed
    values: list[float] = []
    for start in range(1, len(ids), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(ids)))
        values += await asyncio.gather(*(of(draw, ids[:i], ids[i]) for i in some))
    return values


async def _raw(draw: Draw, prompt: list[int], token: int) -> float:
    return _of(token, await draw(prompt, [token]))


async def _processed(draw: Draw, prompt: list[int], token: int) -> float:
    """A token that alone may be drawn has the log-prob 0 here: it is compared with the likeliest one."""
    free = await draw(prompt, None)
    if token in free:
        return free[token]
    likeliest = max(free, key=lambda t: free[t])
    pair = await draw(prompt, [token, likeliest])
    return free[likeliest] + _of(token, pair) - _of(likeliest, pair)


def _of(token: int, drawn: Alternatives) -> float:
    if token not in drawn:
        raise EngineError("The engine drew a token that was not allowed.")
    return drawn[token]
