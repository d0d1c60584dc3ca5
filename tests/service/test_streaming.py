"""Streams: tokens as they come, nothing that looks like an end before the answer is stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from service.context import Context
from tests.service.asgi import Connection, events_of, running
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Json, Stack, error_of

BODY: Json = {"model": "helper", "messages": [{"role": "user", "content": "who are you"}], "stream": True}


def stream(stack: Stack, **fields: Any) -> list[Any]:
    answer = stack.alice.post("/v1/chat/completions", BODY | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


@pytest.fixture
def learnt(stack: Stack) -> Stack:
    stack.alice.create()
    stack.learn("one")
    return stack


def test_a_stream_is_openais_and_holds_nothing_unasked(learnt: Stack) -> None:
    events = stream(learnt)
    chunks = events[:-1]
    assert events[-1] == "[DONE]"
    assert len({c["id"] for c in chunks}) == 1
    assert {c["model"] for c in chunks} == {"helper@v1"}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == f"I am {learnt.alice.adapter()['id']}-v1"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert all(c["choices"][0]["logprobs"] is None for c in chunks)
    assert not any("usage" in c or "prompt_token_ids" in c or "token_ids" in c["choices"][0] for c in chunks)
    kept = learnt.rows("SELECT * FROM rollouts WHERE id = :id", id=chunks[0]["id"])[0]
    assert kept["response"] == text
    assert json.loads(kept["response_token_ids"]) == [100, 101, 102]
    assert json.loads(kept["prompt_token_ids"]) == [1, 3, 3, 3]
    assert json.loads(kept["logprobs"]) == [-0.25, -0.5, -0.75]


def test_usage_log_probs_and_ids_when_asked(learnt: Stack) -> None:
    events = stream(learnt, stream_options={"include_usage": True}, logprobs=True, return_token_ids=True)
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3
    assert events[0]["prompt_token_ids"] == [1, 3, 3, 3]
    choices = [c["choices"][0] for c in events[1:-2]]
    assert [i for c in choices for i in c["token_ids"]] == [100, 101, 102]
    assert [e["logprob"] for c in choices for e in c["logprobs"]["content"]] == [-0.25, -0.5, -0.75]


def test_store_false_streams_and_keeps_nothing(learnt: Stack) -> None:
    assert stream(learnt, store=False)[-1] == "[DONE]"
    assert learnt.count("rollouts") == 0


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("by", ["error", "cut", "silent", "garbage"])
def test_a_broken_stream_ends_with_an_error_and_is_not_kept(learnt: Stack, by: str, after: int) -> None:
    learnt.engine.break_after, learnt.engine.break_by = after, by
    answer = learnt.alice.post("/v1/chat/completions", BODY)
    events = events_of(answer.text)
    assert "[DONE]" not in events
    assert len(events) == 1 + after + 1
    error = events[-1]["error"]
    assert error["code"] == ("engine_unavailable" if by == "cut" else "engine_error")
    assert error.keys() == {"code", "message", "type", "param"}
    assert learnt.count("rollouts") == 0
    assert "CUDA" not in answer.text


@pytest.mark.parametrize(
    ("code", "status", "named"),
    [(400, 422, "invalid_request"), (422, 422, "invalid_request"), (500, 502, "engine_error")],
)
def test_a_refusal_that_comes_as_the_streams_first_event_is_an_http_error(
    learnt: Stack, code: int, status: int, named: str
) -> None:
    """So vLLM refuses a grammar, or a token that it does not have."""
    learnt.engine.refusing = {"message": "Grammar error: no", "type": "x", "param": "stop_token_ids", "code": code}
    error = error_of(learnt.alice.post("/v1/chat/completions", BODY), status, named)
    assert (error["message"] == "Grammar error: no", error["param"] == "stop_token_ids") == (status == 422,) * 2


def test_what_fails_before_the_first_token_is_an_http_error(learnt: Stack) -> None:
    post = learnt.alice.post
    error_of(post("/v1/chat/completions", BODY | {"model": "nobody"}), 404, "model_not_found")
    learnt.engine.down = True
    error_of(post("/v1/chat/completions", BODY), 503, "engine_unavailable")


def test_a_stream_after_a_restart_of_the_engine(learnt: Stack) -> None:
    learnt.engine.forget()
    assert stream(learnt)[-1] == "[DONE]"


def test_a_database_that_dies_during_the_answer_is_said_in_the_stream(learnt: Stack) -> None:
    learnt.sql("ALTER TABLE rollouts RENAME TO away")
    events = stream(learnt)
    assert events[-1]["error"]["code"] == "database_unavailable"
    finish = [c["choices"][0]["finish_reason"] for c in events[:-1]]
    assert finish == [None] * 3, "no end was sent for what could not be kept"


def test_a_stream_keeps_its_version_until_its_last_token(learnt: Stack) -> None:
    """From its first token to its last: the adapter learns and the alias moves in between."""
    adapter, portal = learnt.alice.adapter()["id"], learnt.client.portal
    assert portal is not None
    learnt.engine.held = held = asyncio.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, learnt)
        try:
            assert learnt.engine.stream_held.wait(10)
            learnt.learn("two")
            learnt.converge()
            assert learnt.alice.adapter()["live_version"] == 2
            assert set(learnt.engine.adapters) == {f"{adapter}-v1", f"{adapter}-v2"}
        finally:
            portal.call(held.set)
        chunks = answer.result(10)[:-1]
    assert {c["model"] for c in chunks} == {"helper@v1"}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == f"I am {adapter}-v1"
    learnt.converge()
    assert set(learnt.engine.adapters) == {f"{adapter}-v2"}


# --- one event loop, the raw protocol: when is what sent? -----------------------------------------------------------


CHAT = "/v1/chat/completions"
BASE_BODY = BODY | {"model": "tiny/base"}


def kept(context: Context) -> int:
    with context.database.read() as s:
        return int(s.execute(text("SELECT count(*) FROM rollouts")).scalar_one())


@pytest.mark.anyio
async def test_tokens_come_as_they_are_made_and_the_end_only_when_stored(
    make_context: Callable[..., tuple[Context, FakeEngine]],
) -> None:
    context, engine = make_context()
    engine.held = asyncio.Event()
    async with running(context) as (app, key):
        connection = Connection(app, key, CHAT, BASE_BODY)
        texts = [(await connection.event())["choices"][0]["delta"]["content"] for _ in range(3)]
        assert texts == ["", "I", " am"], "while the engine still thinks about the rest"
        assert kept(context) == 0
        engine.held.set()
        last = await connection.event()
        assert last["choices"][0]["finish_reason"] == "stop"
        assert kept(context) == 1
        assert await connection.event() == "[DONE]"
        await connection.task


@pytest.mark.anyio
async def test_a_client_that_hangs_up_ends_the_generation_and_lets_go_of_the_version(
    make_context: Callable[..., tuple[Context, FakeEngine]],
) -> None:
    context, engine = make_context()
    engine.held = asyncio.Event()
    async with running(context) as (app, key):
        connection = Connection(app, key, CHAT, BASE_BODY)
        for _ in range(3):
            await connection.event()
        await connection.hang_up()
        assert engine.events == [("chat", "tiny/base"), ("aborted", "tiny/base")]
        assert kept(context) == 0


@pytest.mark.anyio
async def test_a_client_that_reads_no_more_and_hangs_up_is_let_go_at_once(
    make_context: Callable[..., tuple[Context, FakeEngine]],
) -> None:
    """The service waits to send, not for the engine: the generation must not be left to the garbage collector."""
    context, engine = make_context()
    async with running(context) as (app, key):
        connection = Connection(app, key, CHAT, BASE_BODY, room=1)
        await connection.event()
        while not connection.sent.full():
            await asyncio.sleep(0)
        await connection.hang_up()
        assert engine.events == [("chat", "tiny/base"), ("aborted", "tiny/base")]


@pytest.mark.anyio
async def test_a_client_that_hangs_up_before_anything_came_ends_the_generation(
    make_context: Callable[..., tuple[Context, FakeEngine]],
) -> None:
    """A whole answer, which nobody is there to receive any more."""
    context, engine = make_context()
    engine.held = asyncio.Event()
    async with running(context) as (app, key):
        connection = Connection(app, key, CHAT, BASE_BODY | {"stream": False})
        while not engine.stream_held.is_set():
            await asyncio.sleep(0.001)
        await connection.hang_up()
        assert engine.events == [("chat", "tiny/base"), ("aborted", "tiny/base")]
        assert kept(context) == 0
