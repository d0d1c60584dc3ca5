"""What the gateway refuses, by name: fields, values beyond their bounds, and what would cost the engine dear."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.service.harness import Json, Stack, error_of
from tests.service.test_gateway_openai import CALL, CHAT, TOOLS, USER, body


@pytest.fixture
def helper(stack: Stack) -> Stack:
    stack.alice.create()
    return stack


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {}), ("kv_transfer_params", {}), ("priority", 1),
        ("prompt_embeds", "x"), ("cache_salt", "mine"), ("request_id", "mine"), ("structured_outputs", {}),
        ("best_of", 2), ("functions", []), ("colour", "red"), ("logprob_token_ids", [1]), ("vllm_xargs", {}),
        ("continue_final_message", True), ("add_special_tokens", True), ("truncate_prompt_tokens", 4),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(helper: Stack, field: str, value: Any) -> None:
    answer = helper.alice.post(CHAT, body(**{field: value}))
    assert error_of(answer, 422, "unknown_parameter")["param"] == field
    assert field in answer.json()["error"]["message"]
    assert helper.engine.payloads == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 65_537}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"tool_choice": "auto"}, "body"),
        ({"tools": []}, "tools"),
        ({"tools": [TOOLS[0]] * 129}, "tools"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "response_format": {"type": "json_object"}}, "body"),
        ({"allowed_token_ids": [1], "tools": TOOLS, "tool_choice": "required"}, "body"),
        ({"bad_words": ["ü" * 256]}, "bad_words"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**63 - 2, "n": 3}, "body"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": 2**31}, "thinking_token_budget"),
        ({"repetition_detection": {"max_pattern_size": 33, "min_count": 2}}, "repetition_detection.max_pattern_size"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"include_reasoning": False, "logprobs": True}, "body"),
        ({"include_reasoning": False, "return_token_ids": True}, "body"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
         "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
    ],
)  # fmt: skip
def test_bounds(helper: Stack, fields: Json, param: str) -> None:
    assert error_of(helper.alice.post(CHAT, body(**fields)), 422, "invalid_parameter")["param"] == param
    assert helper.engine.payloads == []


def nested(depth: int) -> Json:
    made: Json = {}
    for _ in range(depth):
        made = {"a": made}
    return made


@pytest.mark.parametrize(
    "schema",
    [nested(40), {"enum": list(range(5000))}, {"a": "\x00"}, {"\ud800": 1}, {"enum": ["x" * 500] * 201},
     {"enum": ["x" * 513]}, {"const": "x" * 513}, {"properties": {"x" * 513: {}}},
     {"type": "array", "minItems": 2**62}, {"items": {"maxLength": 1e300}}, {"minLength": -1}],
)  # fmt: skip
def test_schemas_that_would_cost_the_engine_dear_or_cannot_be_sent(helper: Stack, schema: Json) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    formatted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for fields in ({"tools": [tool]}, {"response_format": formatted}):
        answer = helper.alice.request(
            "POST", CHAT, content=json.dumps(body(**fields)), headers={"content-type": "application/json"}
        )
        error_of(answer, 422, "invalid_parameter")


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [("[" * 5000 + "]" * 5000, False), ('{"a":' * 40 + "1" + "}" * 40, False),
     ('{"a": [' + "[1]," * 5000 + "1]}", True), ("{" * 5000, True)],
)  # fmt: skip
def test_arguments_that_no_engine_could_read_again(helper: Stack, arguments: str, taken: bool) -> None:
    """What is no JSON is the model's own mistake, and goes on as it is."""
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "x"}
    answer = helper.alice.post(CHAT, body(messages=[*USER, {"role": "assistant", "tool_calls": [call]}, result]))
    assert answer.status_code == (200 if taken else 422)


def test_what_a_property_is_called_is_no_count(helper: Stack) -> None:
    schema = {"type": "object", "properties": {"minItems": {"type": "integer"}, "maxLength": {"type": "string"}}}
    fields: Json = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    helper.alice.ok("POST", CHAT, body(**fields))
    assert helper.engine.payloads[-1]["response_format"] == fields["response_format"]
