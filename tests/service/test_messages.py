"""Anthropic's messages, by the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.service.harness import Json, Stack
from tests.service.test_gateway_openai import CALL, CALL_DELTAS, THINKING, kept

PATH = "/v1/messages"
TOOL = {"name": "weather", "description": "of a place", "input_schema": {"type": "object", "properties": {}}}
ASK: Json = {"model": "helper", "max_tokens": 20, "messages": [{"role": "user", "content": "who are you"}]}


@pytest.fixture
def helper(stack: Stack) -> Stack:
    stack.alice.create()
    return stack


def sent(stack: Stack, **fields: Any) -> Any:
    """As Anthropic's clients send it: the key in a header of its own, no bearer."""
    headers = {"x-api-key": stack.alice.key, "anthropic-version": "2023-06-01"}
    return stack.client.post(PATH, headers=headers, json=ASK | fields)


def events(stack: Stack, **fields: Any) -> list[Json]:
    answer = sent(stack, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


def test_a_whole_message(helper: Stack) -> None:
    answer = sent(helper)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    completion = body.pop("id")
    assert completion.startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "helper@v0",
        "content": [{"type": "text", "text": "I am tiny/base"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 4, "output_tokens": 3},
        "perennial": {"adapter": "helper", "version": 0},
    }
    assert kept(helper, completion)["response_token_ids"] == [100, 101, 102]
    told = {"items": [{"completion_id": completion, "feedback": "shorter"}]}
    batch = helper.alice.ok("POST", "/v1/feedback", told)
    assert helper.alice.ok("GET", f"/v1/feedback/{batch['id']}")["items"][0]["completion_id"] == completion
    assert helper.worker.must_lease().items[0].messages == ASK["messages"]


def test_a_streamed_message(helper: Stack) -> None:
    found = events(helper)
    assert [e["type"] for e in found] == [
        "message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    message = found[0]["message"]
    assert (message["content"], message["stop_reason"], message["usage"]["input_tokens"]) == ([], None, 4)
    assert found[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(e["delta"]["text"] for e in found[2:5]) == "I am tiny/base"
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"] == {"output_tokens": 3}
    assert kept(helper, message["id"])["response"] == "I am tiny/base"


def test_reasoning_text_and_tools_are_blocks_of_their_own(helper: Stack) -> None:
    helper.engine.deltas = [*THINKING[1:], CALL_DELTAS[0]]
    helper.engine.deltas[-1] = {"tool_calls": [CALL | {"index": 0}]}
    found = events(helper, tools=[TOOL])
    started = [e["content_block"] for e in found if e["type"] == "content_block_start"]
    assert [b["type"] for b in started] == ["thinking", "text", "tool_use"]
    assert (started[2]["id"], started[2]["name"], started[2]["input"]) == ("call_1", "weather", {})
    deltas = [(e["index"], e["delta"]) for e in found if e["type"] == "content_block_delta"]
    assert deltas == [
        (0, {"type": "thinking_delta", "thinking": "rain"}),
        (1, {"type": "text_delta", "text": "rain"}),
        (2, {"type": "input_json_delta", "partial_json": '{"place": "Zürich"}'}),
    ]
    assert [e["index"] for e in found if e["type"] == "content_block_stop"] == [0, 1, 2]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"

    helper.engine.deltas = [{"reasoning": "hm"}, {"content": "rain"}, {"tool_calls": [CALL]}]
    body = sent(helper, tools=[TOOL]).json()
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "rain"},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"place": "Zürich"}},
    ]
    assert body["stop_reason"] == "tool_use"


def test_a_call_in_pieces(helper: Stack) -> None:
    helper.engine.deltas = CALL_DELTAS
    found = events(helper, tools=[TOOL])
    assert sum(e["type"] == "content_block_start" for e in found) == 1
    pieces = [e["delta"]["partial_json"] for e in found if e["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"place": "Zürich"}


def test_a_conversation_with_tools_becomes_openais(helper: Stack) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"} | mark]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "ask", "signature": "s"},
                {"type": "text", "text": "one moment"},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"place": "Zürich"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "12°"}]} | mark,
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    fields = {
        "system": [{"type": "text", "text": "be kind"} | mark], "messages": messages, "tools": [TOOL | mark],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "stop_sequences": ["x"], "top_k": 5,
        "metadata": {"user_id": "canary"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    assert sent(helper, **fields).status_code == 200
    payload = helper.engine.payloads[-1]
    assert payload["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "one moment", "tool_calls": [CALL], "reasoning": "ask"},
        {"role": "tool", "content": "12°", "tool_call_id": "call_1"},
        {"role": "user", "content": "and?"},
    ]
    function = {"name": "weather", "description": "of a place", "parameters": TOOL["input_schema"]}
    assert payload["tools"] == [{"type": "function", "function": function}]
    assert (payload["tool_choice"], payload["parallel_tool_calls"]) == ("required", False)
    assert (payload["stop"], payload["top_k"], payload["max_tokens"]) == (["x"], 5, 20)
    assert "canary" not in json.dumps(payload)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "said"),
    [
        ({"model": "nobody"}, 404, "not_found_error", "There is no model 'nobody'"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"colour": 1}, 400, "invalid_request_error", "colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
         "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, 400,
         "invalid_request_error", "only an assistant"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
    ],
)  # fmt: skip
def test_errors_are_anthropics(helper: Stack, fields: Json, status: int, kind: str, said: str) -> None:
    answer = sent(helper, **fields)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert said in body["error"]["message"]
    assert helper.engine.payloads == []


def test_without_a_key_and_without_an_engine(helper: Stack) -> None:
    nobody = helper.client.post(PATH, json=ASK)
    assert (nobody.status_code, nobody.json()["error"]["type"]) == (401, "authentication_error")
    wrong = helper.client.post(PATH, json=ASK, headers={"x-api-key": "sk-wrong"})
    assert wrong.status_code == 401
    worker = {"x-api-key": helper.worker.caller.key}
    assert helper.client.post(PATH, json=ASK, headers=worker).json()["error"]["type"] == "permission_error"
    helper.engine.down = True
    away = sent(helper)
    assert (away.status_code, away.json()["error"]["type"]) == (503, "overloaded_error")
    assert away.headers["retry-after"] == "2"


def test_a_stream_that_breaks_ends_with_an_error_event(helper: Stack) -> None:
    helper.engine.break_after, helper.engine.break_by = 1, "error"
    found = events(helper)
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    assert not any(e["type"] == "message_stop" for e in found)
    assert helper.count("rollouts") == 0
