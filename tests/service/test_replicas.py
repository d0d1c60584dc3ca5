"""Several engines: each is made whole before it takes traffic, and none is asked for what it does not have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from service.serving.names import served_name
from tests.service.fake_engine import FakeEngine
from tests.service.fleet import FakeFleet
from tests.service.harness import Json, Stack, error_of

MESSAGES = [{"role": "user", "content": "who are you"}]


@dataclass(frozen=True)
class Several:
    stack: Stack
    fleet: FakeFleet

    def name(self, n: int) -> str:
        return served_name(self.stack.alice.adapter()["id"], n)

    def holders(self, n: int) -> list[bool]:
        return [self.name(n) in e.adapters for e in self.fleet.engines]

    def commit(self, remark: str = "x") -> str:
        job = str(self.stack.alice.feedback(remark)["job_id"])
        self.stack.worker.train()
        return job

    def ask(self, **fields: object) -> Json:
        return self.stack.alice.chat("helper", **fields)


@pytest.fixture
def several(make_stack: Callable[..., Stack]) -> Callable[..., Several]:
    def make(size: int = 3, **settings: object) -> Several:
        fleet = FakeFleet(size)
        stack = make_stack(fleet, engine_urls=fleet.urls, **settings)
        stack.alice.create()
        return Several(stack, fleet)

    return make


def test_every_replica_gets_the_live_version(several: Callable[..., Several]) -> None:
    it = several()
    it.stack.learn("one")
    it.stack.converge()
    assert it.holders(1) == [True, True, True]
    it.stack.learn("two")
    it.stack.converge()
    assert it.holders(2) == [True, True, True]
    assert it.holders(1) == [False, False, False]


def test_the_alias_moves_when_one_replica_has_the_version(several: Callable[..., Several]) -> None:
    it = several()
    it.stack.converge()
    for engine in it.fleet.engines[1:]:
        engine.down = True
    it.stack.learn("one")
    assert it.stack.alice.adapter()["live_version"] == 1
    assert it.ask()["model"] == "helper@v1"
    assert it.fleet.chats() == [1, 0, 0]


def test_or_only_when_all_that_are_up_have_it(several: Callable[..., Several]) -> None:
    it = several(2, publish_when="all")
    it.stack.converge()
    late = it.fleet.engines[1]
    late.refused[it.name(1)] = 503  # not ready for it, and not a refusal for good
    it.stack.learn("one")
    assert it.holders(1) == [True, False]
    assert it.stack.alice.adapter()["live_version"] == 0
    late.refused.clear()
    it.stack.converge()
    assert it.stack.alice.adapter()["live_version"] == 1


def test_a_replica_that_refuses_the_version_gets_no_traffic_for_it(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.converge()
    it.fleet.engines[0].refused[it.name(1)] = 500
    it.stack.learn("one")
    it.stack.converge()
    assert it.stack.alice.adapter()["live_version"] == 1
    for i in range(6):
        it.ask(content=f"question {i}")
    assert it.fleet.chats() == [0, 6]


def test_a_version_that_every_replica_refuses_is_rejected(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.converge()
    for engine in it.fleet.engines:
        engine.refused[it.name(1)] = 500
    job = it.commit()
    it.stack.converge()
    it.stack.converge()
    assert it.stack.alice.job(job)["error"]["code"] == "version_rejected"
    assert it.stack.alice.adapter()["head_version"] == 0


def test_a_replica_that_went_away_loses_its_traffic_and_comes_back_whole(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.learn("one")
    it.stack.converge()
    it.fleet.engines[0].down = True
    it.stack.learn("two")
    for i in range(4):
        it.ask(content=f"question {i}")
    assert it.fleet.chats() == [0, 4]
    it.fleet.engines[0].forget()  # it was restarted
    it.fleet.engines[0].down = False
    it.stack.converge()
    assert it.holders(2) == [True, True]
    order = [e for e in it.fleet.engines[0].events if e[1] == it.name(2)]
    for i in range(20):
        it.ask(content=f"question {i}")
    assert it.fleet.chats()[0] > 0
    assert order == [("load", it.name(2))], "loaded before it answered anything"


def test_requests_that_meet_a_dead_replica_find_the_other(several: Callable[..., Several]) -> None:
    """Not asked for by any pass of the publisher: a version that must be loaded is loaded elsewhere."""
    it = several(2)
    it.stack.learn("one")
    it.stack.learn("two")
    it.stack.converge()
    it.fleet.engines[0].down = True
    for i in range(4):
        body = {"model": "helper@v1", "messages": [{"role": "user", "content": f"question {i}"}]}
        assert it.stack.alice.ok("POST", "/v1/chat/completions", body)["model"] == "helper@v1"
    assert it.fleet.chats() == [0, 4]


def test_an_engine_that_is_healthy_and_generates_nothing_does_not_count(several: Callable[..., Several]) -> None:
    it = several(2, probe_seconds=0.0)
    it.stack.learn("one")
    it.stack.converge()
    it.fleet.engines[0].dead = True  # /health still says 200
    it.stack.converge()
    for i in range(6):
        it.ask(content=f"question {i}")
    assert it.fleet.chats() == [0, 6]
    it.fleet.engines[0].dead = False
    it.stack.converge()
    assert [r.up for r in it.stack.context.serving.replicas] == [True, True]


def test_ready_means_that_some_engine_generates(several: Callable[..., Several]) -> None:
    it = several(2, probe_seconds=0.0)
    it.stack.worker.lease()
    assert it.stack.alice.get("/readyz").status_code == 200
    it.fleet.engines[0].dead = True
    it.stack.converge()
    assert it.stack.alice.get("/readyz").status_code == 200
    it.fleet.engines[1].dead = True
    it.stack.converge()
    answer = it.stack.alice.get("/readyz")
    assert (answer.status_code, answer.json()["missing"]) == (503, ["engine"])


def test_an_engine_that_was_dead_and_lives_again_answers_without_a_pass(stack: Stack) -> None:
    stack.alice.create()
    stack.learn("one")
    stack.engine.down = True
    chat = {"model": "helper", "messages": MESSAGES}
    answer = stack.alice.post("/v1/chat/completions", chat)
    error_of(answer, 503, "engine_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    stack.engine.forget()
    stack.engine.down = False
    assert stack.alice.says("helper").endswith("-v1")


def test_conversations_stay_on_their_replica(several: Callable[..., Several]) -> None:
    it = several(3)
    it.stack.learn("one")
    it.stack.converge()
    for turn in range(3):
        before = it.fleet.chats()
        for conversation in range(40):
            messages = [{"role": "user", "content": f"conversation {conversation}"}]
            for past in range(turn):
                messages += [{"role": "assistant", "content": f"a{past}"}, {"role": "user", "content": f"q{past}"}]
            it.ask(messages=messages)
        given = [b - a for a, b in zip(before, it.fleet.chats(), strict=True)]
        if turn == 0:
            first = given
        assert given == first
        assert all(given), "forty conversations are spread over three replicas (one is left out once in four million)"


def test_a_busy_replica_is_passed_over(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.learn("one")
    it.stack.converge()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: it.ask(content="the same conversation"), range(8)))
    loaded = it.fleet.chats()
    assert sum(loaded) == 8
    assert it.stack.client.portal is not None
    replicas = it.stack.context.serving.replicas
    favourite = max(range(2), key=lambda i: loaded[i])
    replicas[favourite].in_flight["somebody-elses"] = 10
    before = it.fleet.chats()
    it.ask(content="the same conversation")
    assert it.fleet.chats()[1 - favourite] == before[1 - favourite] + 1


def test_files_stay_while_a_replica_is_away_that_may_know_them(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.learn("one")
    it.stack.converge()
    adapter = it.stack.alice.adapter()["id"]
    it.fleet.engines[1].down = True
    it.stack.alice.ok("DELETE", "/v1/adapters/helper")
    it.stack.converge()
    assert (it.stack.root / adapter).is_dir()
    it.fleet.engines[1].down = False
    it.stack.converge()
    assert not (it.stack.root / adapter).exists()


def test_500_on_unload_is_tried_again(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.learn("one")
    it.stack.converge()
    it.fleet.engines[0].stuck_unloads = True
    it.stack.learn("two")
    it.stack.converge()
    assert it.holders(1) == [True, False]
    assert it.ask()["model"] == "helper@v2"
    it.fleet.engines[0].stuck_unloads = False
    it.stack.converge()
    assert it.holders(1) == [False, False]


def test_a_slow_replica_holds_up_no_other(several: Callable[..., Several]) -> None:
    it = several(2)
    it.stack.converge()
    slow: FakeEngine = it.fleet.engines[0]
    slow.held_load = asyncio.Event()
    job = it.commit()
    portal = it.stack.client.portal
    assert portal is not None
    portal.call(it.stack.context.publisher.reconcile, it.stack.context.serving.replicas[1])
    assert it.stack.alice.job(job)["published"] is True
    assert it.ask()["model"] == "helper@v1"
    assert it.fleet.chats() == [0, 1]
    portal.call(slow.held_load.set)
    it.stack.converge()
    assert it.holders(1) == [True, True]
