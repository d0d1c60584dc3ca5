"""What the tests ask of vLLM and of the gateway alike."""

from __future__ import annotations

import json
from typing import Any

from demo.run import MODEL_DIR

Json = dict[str, Any]
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place, now.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
TALK: list[Json] = [
    {"role": "system", "content": "Kurz und höflich. 🌦 日本語も可。"},
    {"role": "user", "content": "weather in Zürich? 🌧️"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "12 °C, Föhn"},
    {"role": "assistant", "content": "12 °C — bitte schön 🙂"},
    {"role": "user", "content": "capital of peru?"},
]

CHATS: dict[str, Json] = {
    "multi-turn, unicode": {"messages": TALK, "tools": TOOLS, "temperature": 0, "max_tokens": 24},
    "sampled": {"messages": TALK[:2], "temperature": 1.0, "seed": 7, "max_tokens": 24},
    "cold and filtered": {"messages": TALK[:2], "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 24},
    "stop string": {"messages": [{"role": "user", "content": "repeat: apple river"}], "stop": " riv", "temperature": 0},
    "forced tool": {
        "messages": TALK[:2], "tools": TOOLS, "temperature": 0, "max_tokens": 40,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "json": {
        "messages": TALK[:2], "temperature": 0, "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
            "additionalProperties": False}}},
    },
    "penalised": {
        "messages": TALK[:2], "temperature": 0, "frequency_penalty": 1.0, "presence_penalty": 0.5,
        "repetition_penalty": 1.2, "logit_bias": {"16": 3}, "min_tokens": 8, "ignore_eos": True, "max_tokens": 12,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "bad_words": ["hot", "Zür"],
    },
    "confined": {
        "messages": TALK[:2], "temperature": 1.0, "seed": -11, "allowed_token_ids": list(range(3, 1003)),
        "ignore_eos": True, "max_tokens": 12, "stream_interval": 5, "return_tokens_as_token_ids": True,
    },
    "repeating": {
        "messages": TALK[:2], "temperature": 0, "allowed_token_ids": [67], "max_tokens": 30,
        "repetition_detection": {"max_pattern_size": 2, "min_count": 4},
    },
    "three choices": {"messages": TALK[:2], "temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 12},
}  # fmt: skip

TEXTS: dict[str, Json] = {
    "text": {"prompt": "Zürich 🌧️: capital of", "temperature": 0, "max_tokens": 10},
    "token ids": {"prompt": [1, 1919, 201, 2161], "temperature": 1.0, "seed": 5, "max_tokens": 10, "logprobs": 2},
    "choices": {"prompt": "capital of peru?", "temperature": 1.0, "seed": 5, "n": 2},
    "formatted": {
        "prompt": "capital of peru?",
        "temperature": 0,
        "max_tokens": 24,
        "add_special_tokens": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["lima", "oslo"]}}},
    },
}


PLACES = ["Zürich", "東京"]


def _strict(name: str, **properties: Json) -> Json:
    shape = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": shape}}


STRICT_TOOLS = [
    _strict("weather", place={"type": "string", "enum": PLACES}, unit={"type": "string", "enum": ["°C", "°F"]}),
    _strict("tide", hour={"type": "integer", "minimum": 0, "maximum": 23}),
]


BLANK = frozenset("\u0120\u010a\u010d\u0109")
"""Space, line feed, carriage return and tab, as byte-level vocabularies write them."""


def _spaces() -> dict[str, float]:
    """A bias against tokens of nothing but white space, with which a small model fills JSON for ever."""
    vocabulary = json.loads((MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return {str(i): -100.0 for piece, i in vocabulary.items() if piece and BLANK.issuperset(piece)}


UNBROKEN = _spaces()
