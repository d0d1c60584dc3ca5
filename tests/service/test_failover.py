"""A request whose engine fails before anything was sent is tried once more, on another that holds the version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.service.asgi import events_of
from tests.service.fake_engine import FakeEngine
from tests.service.fleet import FakeFleet
from tests.service.harness import Json, Stack, error_of

CHAT = "/v1/chat/completions"
ASK: Json = {"model": "helper", "messages": [{"role": "user", "content": "who are you"}]}
SAY: Json = {"model": "helper", "prompt": "who are you", "stream": True}


@dataclass(frozen=True)
class Several:
    stack: Stack
    fleet: FakeFleet

    def favourite(self, path: str = CHAT, body: Json = ASK) -> FakeEngine:
        """The engine that this conversation goes to."""
        before = self.fleet.chats()
        answer = self.stack.alice.post(path, body | {"store": False})
        assert answer.status_code == 200, answer.text
        (found,) = [e for e, a, b in zip(self.fleet.engines, before, self.fleet.chats(), strict=True) if b > a]
        return found

    def forget(self) -> None:
        for engine in self.fleet.engines:
            engine.events.clear()

    def happened(self, kind: str) -> int:
        return sum(1 for e in self.fleet.engines for k, _ in e.events if k == kind)


@pytest.fixture
def several(make_stack: Callable[..., Stack]) -> Callable[[int], Several]:
    """So many engines, all with version 1 of helper."""

    def make(size: int) -> Several:
        fleet = FakeFleet(size)
        stack = make_stack(fleet, engine_urls=fleet.urls, probe_seconds=3600.0)
        stack.alice.create()
        stack.learn("one")
        stack.converge()
        return Several(stack, fleet)

    return make


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_the_other_engine_answers(several: Callable[[int], Several], status: int, stream: bool) -> None:
    it = several(2)
    it.favourite().failing = status
    it.forget()
    answer = it.stack.alice.post(CHAT, ASK | {"stream": stream})
    assert answer.status_code == 200, answer.text
    first = events_of(answer.text)[0] if stream else answer.json()
    assert first["model"] == "helper@v1"
    assert (it.happened("failed"), it.happened("chat"), it.happened("done")) == (1, 1, int(stream))
    kept = it.stack.rows("SELECT id, response FROM rollouts")
    assert [r["id"] for r in kept] == [first["id"]]


@pytest.mark.parametrize("by", ["error", "cut", "silent"])
def test_a_stream_that_ends_before_its_first_chunk_is_asked_for_again(
    several: Callable[[int], Several], by: str
) -> None:
    """Text completions: no chunk comes before the first token. The first try does not go on."""
    it = several(2)
    broken = it.favourite("/v1/completions", SAY)
    broken.break_after, broken.break_by = 0, by
    it.forget()
    answer = it.stack.alice.post("/v1/completions", SAY)
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    text = "".join(c["text"] for e in events[:-1] for c in e["choices"])
    assert text == f"I am {it.stack.served(1)}"
    assert [k for k, _ in broken.events if k != "unload"] in (["chat", "aborted"], ["chat", "done"])
    assert it.happened("chat") == 2
    assert it.stack.rows("SELECT response FROM rollouts")[0]["response"] == text


def test_nothing_is_tried_again_once_something_was_sent(several: Callable[[int], Several]) -> None:
    it = several(2)
    for engine in it.fleet.engines:
        engine.break_after, engine.break_by = 1, "cut"
    answer = it.stack.alice.post(CHAT, ASK | {"stream": True})
    events = events_of(answer.text)
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert it.happened("chat") == 1
    assert it.stack.count("rollouts") == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("status", "answered", "code"), [(0, 503, "engine_unavailable"), (500, 502, "engine_error")])
def test_two_tries_on_two_engines_and_no_third(
    several: Callable[[int], Several], status: int, answered: int, code: str, stream: bool
) -> None:
    it = several(3)
    for engine in it.fleet.engines:
        engine.failing = status
    answer = it.stack.alice.post(CHAT, ASK | {"stream": stream})
    error_of(answer, answered, code)
    assert (int(answer.headers.get("retry-after", 0)) > 0) == (status == 0)
    assert sorted(sum(k == "failed" for k, _ in e.events) for e in it.fleet.engines) == [0, 1, 1]


def test_an_engine_without_the_version_is_no_second_choice(several: Callable[[int], Several]) -> None:
    it = several(2)
    away = it.fleet.engines[1]
    away.refused[it.stack.served(2)] = 500
    it.stack.learn("two")
    it.stack.converge()
    it.fleet.engines[0].failing = 0
    answer = it.stack.alice.post(CHAT, ASK)
    error_of(answer, 503, "engine_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert it.happened("failed") == 1
    assert not any(kind == "chat" for kind, _ in away.events)


def test_what_is_wrong_with_the_request_is_said_at_once(several: Callable[[int], Several]) -> None:
    it = several(2)
    long = [{"role": "user", "content": "word " * 3000}]
    error_of(it.stack.alice.post(CHAT, ASK | {"messages": long}), 422, "context_length_exceeded")
    assert sum(len(e.payloads) for e in it.fleet.engines) == 1


def test_an_engine_that_failed_must_generate_before_it_is_believed_in(several: Callable[[int], Several]) -> None:
    """The other goes on alone meanwhile."""
    it = several(2)
    favourite = it.favourite()
    favourite.failing, favourite.dead = 500, True
    it.stack.alice.ok("POST", CHAT, ASK)
    it.stack.converge()
    up = {r.url: r.up for r in it.stack.context.serving.replicas}
    assert up[f"http://engine-{it.fleet.engines.index(favourite)}:8000"] is False
    it.forget()
    it.stack.alice.ok("POST", CHAT, ASK)
    assert it.happened("failed") == 0
