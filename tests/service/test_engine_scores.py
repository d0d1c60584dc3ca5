"""Scores by drawing, against the distribution itself."""

from __future__ import annotations

import asyncio
from typing import Literal

import numpy as np
import pytest

from service.engine_scores import Alternatives, score
from service.errors import EngineError

VOCABULARY = 50
IDS = [3, 17, 42, 17, 0, 49]
Mode = Literal["raw_logprobs", "processed_logprobs"]


class Engine:
    """Draws as vLLM does at temperature 1: the token and the two likeliest, by raw or by processed values."""

    def __init__(self, mode: Mode) -> None:
        self.raw = mode == "raw_logprobs"
        self.random = np.random.default_rng(5)

    def logprobs(self, prompt: list[int], allowed: list[int] | None = None) -> np.ndarray:
        logits = 12 * np.random.default_rng(prompt).standard_normal(VOCABULARY)
        if allowed is not None:
            logits[[t for t in range(VOCABULARY) if t not in allowed]] = -np.inf
        shifted = logits - logits.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))

    async def draw(self, prompt: list[int], allowed: list[int] | None) -> Alternatives:
        processed = self.logprobs(prompt, allowed)
        drawn = int(self.random.choice(VOCABULARY, p=np.exp(processed)))
        values = self.logprobs(prompt) if self.raw else processed
        return {int(t): float(values[t]) for t in [drawn, *np.argsort(values)[-2:]]}


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_they_are_the_models_own(mode: Mode) -> None:
    engine = Engine(mode)
    wanted = [engine.logprobs(IDS[:i])[IDS[i]] for i in range(1, len(IDS))]
    assert min(wanted) < -10, "unlikely tokens are among them"
    assert asyncio.run(score(engine.draw, mode, IDS)) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_an_engine_that_allows_other_tokens_is_at_fault(mode: Mode) -> None:
    engine = Engine(mode)

    async def careless(prompt: list[int], _: list[int] | None) -> Alternatives:
        return await engine.draw(prompt, None)

    with pytest.raises(EngineError, match="not allowed"):
        asyncio.run(score(careless, mode, IDS))
