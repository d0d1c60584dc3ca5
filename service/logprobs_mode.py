"""What an engine's log-probs mean, found out by asking it twice.

vLLM reports either the model's own log-probs (`raw_logprobs`, its default) or those after temperature, penalties and
filters (`processed_logprobs`), as it was started; it does not say which. The same prompt at temperature 1 and 2 tells:
raw values are the same both times, processed ones move together, to half the distance from each other.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Json = dict[str, Any]
Mode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits", "unknown"]
PROBE_SALT = "probe"
_TOP = 5
_FLAT = 0.05
"""Nats between the likeliest and the fifth token below which nothing can be told."""


def probe_payload(model: str, temperature: float) -> Json:
    """One token of one fixed prompt, with the likeliest tokens' values."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Name a colour."}],
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": _TOP,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "cache_salt": PROBE_SALT,
    }


def top_values(answer: Json) -> list[float]:
    """The likeliest tokens' values, highest first. Raises LookupError or TypeError for an answer without them."""
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return sorted((float(e["logprob"]) for e in entries), reverse=True)[:_TOP]


def judged(plain: list[float], hot: list[float]) -> Mode:
    """From the values at temperature 1 and at 2."""
    if len(plain) < 2 or len(plain) != len(hot):
        return "unknown"
    logits = any(sum(math.exp(min(v, 1.0)) for v in values) > 1.01 for values in (plain, hot))
    spread, spread_hot = plain[0] - plain[-1], hot[0] - hot[-1]
    if spread < _FLAT:
        return "unknown"
    if spread_hot > 0.9 * spread:
        return "raw_logits" if logits else "raw_logprobs"
    if 0.4 * spread < spread_hot < 0.6 * spread:
        return "processed_logits" if logits else "processed_logprobs"
    return "unknown"
