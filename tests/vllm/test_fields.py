"""Our requests against vLLM's own: whatever vLLM takes is taken or refused by name, and what we send it knows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from api_schemas.chat import ChatRequest
from api_schemas.completions import CompletionRequest
from api_schemas.sampling import REFUSED, SAMPLING_FIELDS, RepetitionDetection, StreamOptions
from api_schemas.tools import Function, Tool
from service.asks import chat_ask, text_ask
from tests.vllm.asked import TALK, TOOLS, Json
from tests.vllm.server import vllm_python

pytestmark = pytest.mark.slow
DEFERRED = {"defer_loading"}
"""Of tools: a client that sends it is told that it is unknown."""
SAMPLED: Json = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": 0.5,
    "repetition_penalty": 1.1, "logit_bias": {"1": 1}, "seed": -7, "stop": "x", "stop_token_ids": [1],
    "include_stop_str_in_output": True, "min_tokens": 1, "ignore_eos": True, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "bad_words": ["x"], "thinking_token_budget": 1,
    "repetition_detection": {"max_pattern_size": 2, "min_count": 2}, "stream_interval": 2,
    "return_tokens_as_token_ids": True, "n": 2, "max_tokens": 4, "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> dict[str, set[str]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    script = Path(__file__).with_name("vllm_fields.py")
    done = subprocess.run(
        [vllm_python(), script], capture_output=True, text=True, check=True, env=environment, timeout=300
    )
    return {kind: set(names) for kind, names in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize(("kind", "ours"), [("chat", ChatRequest), ("text", CompletionRequest)])
def test_every_field_of_vllm_is_taken_or_refused_by_name(
    theirs: dict[str, set[str]], kind: str, ours: type[BaseModel]
) -> None:
    assert theirs[kind] - ours.model_fields.keys() - REFUSED.keys() == set()


@pytest.mark.parametrize(
    ("kind", "ours"),
    [("stream_options", StreamOptions), ("tool", Tool), ("function", Function),
     ("repetition_detection", RepetitionDetection)],
)  # fmt: skip
def test_so_are_the_parts_of_a_request(theirs: dict[str, set[str]], kind: str, ours: type[BaseModel]) -> None:
    assert theirs[kind] - DEFERRED == set(ours.model_fields)


def test_each_effort_of_reasoning_that_vllm_knows_is_taken(theirs: dict[str, set[str]]) -> None:
    optional: Any = ChatRequest.model_fields["reasoning_effort"].annotation
    assert set(get_args(get_args(optional)[0])) == theirs["reasoning_effort"]


def test_what_we_send_vllm_knows(theirs: dict[str, set[str]]) -> None:
    """It drops what it does not know without a word."""
    assert set(SAMPLED) | {"allowed_token_ids"} >= set(SAMPLING_FIELDS)
    formatted = {"response_format": {"type": "json_object"}}
    chat = ChatRequest.model_validate(
        {"model": "m", "messages": TALK, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True,
         "reasoning_effort": "low", "logprobs": True, "top_logprobs": 1} | formatted | SAMPLED
    )  # fmt: skip
    text = CompletionRequest.model_validate(
        {"model": "m", "prompt": "x", "logprobs": 1, "add_special_tokens": False} | formatted | SAMPLED
    )
    assert chat_ask(chat, {}).for_engine("m", "t").keys() - theirs["chat"] == set()
    assert text_ask(text, {}).for_engine("m", "t").keys() - theirs["text"] == set()
    assert "allowed_token_ids" in theirs["chat"] & theirs["text"]
