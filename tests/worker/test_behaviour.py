"""When an engine's log-probs are those of the policy that drew the answer."""

from __future__ import annotations

from typing import Any

import pytest

from worker.behaviour import is_policy

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    "sampling",
    [{}, PLAIN, PLAIN | {"seed": -3, "stop": ["x"], "max_tokens": 5, "ignore_eos": True, "top_k": -1},
     PLAIN | {"thinking_token_budget": -1, "stream_interval": 4, "repetition_detection": {"max_pattern_size": 4}}],
)  # fmt: skip
def test_raw_values_are_the_policy_where_nothing_changed_the_distribution(sampling: dict[str, Any]) -> None:
    assert is_policy("raw_logprobs", sampling)
    assert is_policy("processed_logprobs", sampling)
    for mode in ("raw_logits", "processed_logits", "unknown"):
        assert not is_policy(mode, sampling)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1},
     {"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"logit_bias": {"1": 5}}, {"min_tokens": 4},
     {"bad_words": ["no"]}, {"allowed_token_ids": [5]}, {"thinking_token_budget": 0}],
)  # fmt: skip
def test_what_changes_the_distribution_makes_raw_values_another_policy(change: dict[str, Any]) -> None:
    assert not is_policy("raw_logprobs", PLAIN | change)
    assert is_policy("processed_logprobs", PLAIN | change)


def test_greedy_answers_were_drawn_with_certainty() -> None:
    for mode in ("raw_logprobs", "processed_logprobs"):
        assert not is_policy(mode, PLAIN | {"temperature": 0.0})
