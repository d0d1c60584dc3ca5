"""Everything of OpenAI's chat and text completions that an engine takes: passed on, kept, and shown only if asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.service.asgi import events_of
from tests.service.harness import Json, Stack, error_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER: list[Json] = [{"role": "user", "content": "weather in Zürich? 🌦"}]
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
CALL_DELTAS: list[Json] = [
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather"}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"place": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Zürich"}'}}]},
]
THINKING: list[Json] = [{"reasoning": "hm, "}, {"reasoning": "rain"}, {"content": "rain"}]


@pytest.fixture
def helper(stack: Stack) -> Stack:
    stack.alice.create()
    return stack


def body(**fields: Any) -> Json:
    return {"model": "helper", "messages": USER} | fields


def kept(stack: Stack, rollout_id: str) -> Json:
    row = dict(stack.rows("SELECT * FROM rollouts WHERE id = :id", id=rollout_id)[0])
    packed = ("messages", "tools", "reply", "prompt_token_ids", "response_token_ids", "logprobs", "sampling")
    return row | {k: json.loads(row[k]) if row[k] else None for k in packed}


def streamed(stack: Stack, path: str, **fields: Any) -> list[Any]:
    answer = stack.alice.post(path, fields | {"stream": True})
    assert answer.status_code == 200, answer.text
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    return events[:-1]


def test_every_field_that_the_engine_takes_reaches_it(helper: Stack) -> None:
    fields: Json = {
        "n": 2, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1,
        "logit_bias": {"12": -100}, "stop_token_ids": [7], "include_stop_str_in_output": True, "min_tokens": 1,
        "ignore_eos": True, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "bad_words": ["never"], "tools": TOOLS, "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "weather"}}, "reasoning_effort": "xhigh",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "seed": -(2**63), "thinking_token_budget": 0, "stream_interval": 3, "return_tokens_as_token_ids": True,
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3},
    }  # fmt: skip
    answer = helper.alice.ok("POST", CHAT, body(**fields))
    sent = helper.engine.payloads[-1]
    assert {k: sent[k] for k in fields} == fields
    drawn = {k: fields[k] for k in ("seed", "thinking_token_budget", "repetition_detection", "logit_bias")}
    assert kept(helper, answer["id"])["sampling"].items() >= drawn.items()


def test_tokens_that_alone_are_allowed_reach_the_engine_and_are_kept(helper: Stack) -> None:
    answer = helper.alice.ok("POST", CHAT, body(allowed_token_ids=[5, 7]))
    assert helper.engine.payloads[-1]["allowed_token_ids"] == [5, 7]
    assert kept(helper, answer["id"])["sampling"]["allowed_token_ids"] == [5, 7]


def test_a_conversation_with_tools_reaches_the_template_whole(helper: Stack) -> None:
    talk = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12°"}]},
        {"role": "assistant", "content": "Cold.", "reasoning_content": "12 is cold"},
        {"role": "user", "content": "and tomorrow?"},
    ]
    answer = helper.alice.ok("POST", CHAT, {"model": "helper", "messages": talk, "tools": TOOLS})
    rendered = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12°"},
        {"role": "assistant", "content": "Cold.", "reasoning": "12 is cold"},
        {"role": "user", "content": "and tomorrow?"},
    ]
    assert helper.engine.payloads[-1]["messages"] == rendered
    assert kept(helper, answer["id"])["messages"] == rendered
    assert kept(helper, answer["id"])["tools"] == TOOLS
    helper.alice.ok("POST", "/v1/feedback", {"items": [{"completion_id": answer["id"], "feedback": "x"}]})
    item = helper.worker.must_lease().items[0]
    assert (item.messages, item.tools) == (rendered, TOOLS)


def test_tool_calls_come_through_and_are_kept(helper: Stack) -> None:
    helper.engine.deltas = CALL_DELTAS
    chunks = streamed(helper, CHAT, **body(tools=TOOLS))
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks[1:]]
    assert calls == [d["tool_calls"][0] for d in CALL_DELTAS]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    row = kept(helper, chunks[0]["id"])
    assert (row["response"], row["reply"]) == ("", {"tool_calls": [CALL]})
    assert row["response_token_ids"] == [100, 101, 102]

    helper.engine.deltas = [{"tool_calls": [CALL]}]
    whole = helper.alice.ok("POST", CHAT, body(tools=TOOLS))
    assert whole["choices"][0]["message"] == {"role": "assistant", "tool_calls": [CALL], "content": None}
    assert kept(helper, whole["id"])["reply"] == {"tool_calls": [CALL]}


def test_reasoning_is_kept_apart(helper: Stack) -> None:
    helper.engine.deltas = THINKING
    chunks = streamed(helper, CHAT, **body())
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, *THINKING]
    row = kept(helper, chunks[0]["id"])
    assert (row["response"], row["reply"]) == ("rain", {"reasoning": "hm, rain"})
    message = helper.alice.ok("POST", CHAT, body())["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "rain", "reasoning": "hm, rain"}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_is_not_wanted_is_kept_and_not_shown(helper: Stack, stream: bool) -> None:
    """vLLM would leave the token ids out as well: it is not told."""
    helper.engine.deltas = THINKING
    if stream:
        chunks = streamed(helper, CHAT, **body(include_reasoning=False))
        assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {"content": "rain"}]
        completion = chunks[0]["id"]
    else:
        answer = helper.alice.ok("POST", CHAT, body(include_reasoning=False))
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "rain"}
        completion = answer["id"]
    assert "include_reasoning" not in helper.engine.payloads[-1]
    row = kept(helper, completion)
    assert (row["reply"], row["response_token_ids"]) == ({"reasoning": "hm, rain"}, [100, 101, 102])


def test_counts_of_each_chunk_where_they_are_asked_for(helper: Stack) -> None:
    running = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(helper, CHAT, **body(stream_options=running))
    assert [c["usage"]["completion_tokens"] for c in chunks[1:]] == [1, 2, 3, 3]
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}, None):
        chunks = streamed(helper, CHAT, **body(stream_options=options))
        assert helper.engine.payloads[-1]["stream_options"] == {"include_usage": True}
        assert ["usage" in c for c in chunks[:4]] == [False] * 4, "as in vLLM"


def test_tokens_that_a_parser_withholds_are_kept_and_shown_only_if_asked(helper: Stack) -> None:
    helper.engine.deltas = [{}, {"content": "rain"}, {}]
    chunks = streamed(helper, CHAT, **body())
    assert [c["choices"][0]["delta"] for c in chunks[1:]] == [{"content": "rain"}, {}]
    assert kept(helper, chunks[0]["id"])["response_token_ids"] == [100, 101, 102]
    chunks = streamed(helper, CHAT, **body(return_token_ids=True))
    assert [c["choices"][0]["token_ids"] for c in chunks[1:]] == [[100], [101], [102]]


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_is_a_rollout_that_feedback_can_name(helper: Stack, stream: bool) -> None:
    if stream:
        chunks = streamed(helper, CHAT, **body(n=3))
        completion = chunks[0]["id"]
        texts = ["".join(c["choices"][0]["delta"].get("content", "") for c in chunks
                         if c["choices"][0]["index"] == i) for i in range(3)]  # fmt: skip
        assert [c["choices"][0]["finish_reason"] for c in chunks[-3:]] == ["stop"] * 3
    else:
        answer = helper.alice.ok("POST", CHAT, body(n=3))
        completion = answer["id"]
        texts = [c["message"]["content"] for c in answer["choices"]]
    assert texts == ["I am tiny/base"] * 3
    ids = [completion, f"{completion}-1", f"{completion}-2"]
    rows = [kept(helper, i) for i in ids]
    assert [r["response_token_ids"][0] for r in rows] == [100, 200, 300]
    assert {tuple(r["prompt_token_ids"]) for r in rows} == {tuple(rows[0]["prompt_token_ids"])}

    items = [{"completion_id": completion, "choice": c, "feedback": "x"} for c in (2, 0)]
    batch = helper.alice.ok("POST", "/v1/feedback", {"items": items})
    shown = helper.alice.ok("GET", f"/v1/feedback/{batch['id']}")["items"]
    assert [(i["completion_id"], i["choice"]) for i in shown] == [(completion, 2), (completion, 0)]
    assert [i.response_token_ids[0] for i in helper.worker.must_lease().items] == [300, 100]  # type: ignore[index]
    missing = {"items": [{"completion_id": completion, "choice": 3, "feedback": "x"}]}
    error_of(helper.alice.post("/v1/feedback", missing), 404, "completion_not_found")


def test_text_completions(helper: Stack) -> None:
    ask: Json = {"model": "helper", "prompt": "once upon a time"}
    whole = helper.alice.ok("POST", TEXT, ask)
    assert whole["id"].startswith("cmpl-")
    assert (whole["object"], whole["model"]) == ("text_completion", "helper@v0")
    choice = {"index": 0, "text": "I am tiny/base", "logprobs": None, "finish_reason": "stop"}
    assert whole["choices"] == [choice]
    row = kept(helper, whole["id"])
    assert (row["messages"], row["response_token_ids"], row["prompt_token_ids"]) == (
        [],
        [100, 101, 102],
        [1, 4, 4, 1, 4],
    )
    assert row["logprobs"] == [-0.25, -0.5, -0.75]
    assert helper.engine.payloads[-1]["max_tokens"] == 16

    chunks = streamed(helper, TEXT, **ask, logprobs=0, return_token_ids=True, stream_options={"include_usage": True})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "I am tiny/base"
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [1, 4, 4, 1, 4]
    assert [c["choices"][0]["logprobs"]["token_logprobs"] for c in chunks[:-1]] == [[-0.25], [-0.5], [-0.75]]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert kept(helper, chunks[0]["id"])["logprobs"] == [-0.25, -0.5, -0.75]

    told = {"items": [{"completion_id": whole["id"], "feedback": "x"}]}
    error_of(helper.alice.post("/v1/feedback", told), 422, "not_a_conversation")

    own: Json = {"add_special_tokens": False, "response_format": {"type": "json_object"}}
    helper.alice.ok("POST", TEXT, ask | own)
    assert helper.engine.payloads[-1].items() >= own.items()


def test_an_engine_without_text_completions_says_so(helper: Stack) -> None:
    helper.engine.texts = False
    error_of(helper.alice.post(TEXT, {"model": "helper", "prompt": "x"}), 422, "unsupported_by_engine")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("raw_logprobs", "raw_logprobs"), ("processed_logprobs", "processed_logprobs"), ("raw_logits", "raw_logits"),
     ("processed_logits", "processed_logits")],
)  # fmt: skip
def test_what_log_probs_mean_is_found_out_once_and_kept(helper: Stack, mode: str, expected: str) -> None:
    helper.engine.logprobs_mode = mode
    answers = [helper.alice.chat() for _ in range(3)]
    assert [kept(helper, a["id"])["logprobs_mode"] for a in answers] == [expected] * 3
    assert helper.engine.mode_probes == 2
    helper.alice.ok("POST", "/v1/feedback", {"items": [{"completion_id": answers[0]["id"], "feedback": "x"}]})
    item = helper.worker.must_lease().items[0]
    assert item.logprobs_mode == expected
    assert item.sampling["temperature"] == 1.0


def test_an_engine_that_was_away_may_have_come_back_as_another(helper: Stack) -> None:
    assert kept(helper, helper.alice.chat()["id"])["logprobs_mode"] == "raw_logprobs"
    helper.engine.down = True
    helper.alice.post(CHAT, body())
    helper.engine.down, helper.engine.logprobs_mode = False, "processed_logprobs"
    assert kept(helper, helper.alice.chat()["id"])["logprobs_mode"] == "processed_logprobs"


def test_the_setting_overrides_what_would_be_found_out(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(engine_logprobs_mode="processed_logprobs")
    assert kept(stack, stack.alice.chat("tiny/base")["id"])["logprobs_mode"] == "processed_logprobs"
    assert stack.engine.mode_probes == 0


def test_the_models_own_sampling_is_sent_and_recorded(
    make_stack: Callable[..., Stack], model_dir: Path, tmp_path: Path
) -> None:
    """vLLM takes generation_config.json where a request says nothing: it is no temperature of 1 then."""
    own = shutil.copytree(model_dir, tmp_path / "model")
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": 2}
    (own / "generation_config.json").write_text(json.dumps(config))
    stack = make_stack(model_dir=own)
    answer = stack.alice.chat("tiny/base", top_p=0.5)
    wanted = {"temperature": 0.6, "top_p": 0.5, "top_k": 20}
    assert {k: stack.engine.payloads[-1].get(k) for k in wanted} == wanted
    assert "min_p" not in stack.engine.payloads[-1]
    assert kept(stack, answer["id"])["sampling"] == wanted | {"min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_answers_than_were_asked_for_are_not_kept(helper: Stack, stream: bool) -> None:
    one = {"message": {"content": "x"}, "token_ids": [1], "finish_reason": "stop", "index": 0}
    helper.engine.raw_answer = json.dumps({"choices": [one], "prompt_token_ids": [1]}).encode()
    if stream:
        helper.engine.break_after, helper.engine.break_by = 2, "silent"
    answer = helper.alice.post(CHAT, body(n=2, stream=stream))
    assert "engine_error" in answer.text
    assert helper.count("rollouts") == 0
