"""One service before two real vLLM servers, one of which is killed under load and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.local import LocalStack
from tests.vllm.conftest import stack_before
from tests.vllm.server import VllmServer, wait_engine
from tests.vllm.tenant import Answer, Tenant, weights
from tests.vllm.waits import loads_before_traffic, ours, wait_for, wait_live

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ["a", "b"]
PROMPTS = [f"which of the {word} comes first?" for word in ("gulls", "boats", "lamps", "ropes")]
MANY = [f"{prompt} (list {number})" for prompt in PROMPTS for number in range(4)]
"""So many conversations that each server is the favourite of some, whatever its port."""
TOKENS = 64
STREAMS = 3
BRISK, GENTLE = 0.05, 0.5
"""Seconds between two requests of a client; gentle while a server starts, which needs the cores as well."""


@pytest.fixture
def pair(second_vllm: VllmServer, vllm: VllmServer) -> tuple[VllmServer, VllmServer]:
    """The first is the one that dies."""
    return second_vllm, vllm


@contextmanager
def before(pair: tuple[VllmServer, VllmServer], data: Path) -> Iterator[tuple[LocalStack, Tenant]]:
    local = stack_before(pair[0], data, PERENNIAL_ENGINE_URLS=",".join(s.url for s in pair))
    try:
        local.start("service")
        wait_engine(local)
        tenant = Tenant(local.url, local.api_key)
        yield local, tenant
        tenant.close()
    finally:
        local.stop()


@dataclass
class Load:
    """Clients that ask without end: some stream, one takes whole answers."""

    tenant: Tenant
    over: threading.Event = field(default_factory=threading.Event)
    pause: float = BRISK
    streamed: list[tuple[float, Answer]] = field(default_factory=list)
    """Each with the time at which it was asked."""
    whole: list[tuple[float, float, int, str]] = field(default_factory=list)
    """When it was asked and answered, status, body."""
    asked: float = float("inf")
    """When the whole answer that is under way was asked for."""

    def stream(self, number: int) -> None:
        turn = number
        while not self.over.wait(self.pause):
            asked = time.monotonic()
            answer = self.tenant.ask(NAMES[turn % 2], PROMPTS[turn % len(PROMPTS)], TOKENS)
            self.streamed.append((asked, answer))
            turn += 1

    def take_whole(self) -> None:
        while not self.over.wait(self.pause):
            message = {"role": "user", "content": MANY[len(self.whole) % len(MANY)]}
            body = {"model": NAMES[0], "messages": [message], "max_tokens": TOKENS, "temperature": 0, "store": False}
            self.asked = asked = time.monotonic()
            answer = self.tenant.send("POST", "/v1/chat/completions", json=body | {"ignore_eos": True})
            self.asked = float("inf")
            self.whole.append((asked, time.monotonic(), answer.status_code, answer.text))

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(STREAMS + 1) as pool:
            clients = [pool.submit(self.stream, i) for i in range(STREAMS)] + [pool.submit(self.take_whole)]
            try:
                yield
            finally:
                self.over.set()
            for client in clients:
                client.result()


def holding(server: VllmServer, stack: LocalStack, n: int) -> int:
    """How many adapters of this service the server has in version n."""
    return sum(name.endswith(f"-v{n}") for name in ours(server, stack))


def answered(server: VllmServer) -> float:
    return server.metric("vllm:request_success_total")


def test_one_of_two_servers_dies_under_load_and_comes_back_whole(
    pair: tuple[VllmServer, VllmServer], tmp_path: Path
) -> None:
    dying, other = pair
    with before(pair, tmp_path / "data") as (stack, tenant):
        for i, name in enumerate(NAMES):
            tenant.create(name)
            wait_live(tenant, name, tenant.upload(name, weights(80 + i)))
        wait_for(lambda: all(holding(server, stack, 1) == len(NAMES) for server in pair))
        load, counts = Load(tenant), [answered(server) for server in pair]
        with load.running():
            wait_for(lambda: all(answered(s) > before + 2 for s, before in zip(pair, counts, strict=True)))
            killed = kill_while_answering(dying, load)
            mark = dying.logged()  # what comes behind it was written by the next server
            wait_live(tenant, NAMES[0], tenant.upload(NAMES[0], weights(90)))  # the other is enough
            wait_for(lambda: sum(asked > killed for asked, _ in load.streamed) > 4 * STREAMS)
            load.pause = GENTLE
            dying.start()
            dying.wait_healthy()
            load.pause = BRISK
            wait_for(lambda: '"POST /v1/chat/completions' in dying.log_from(mark))
            wait_for(lambda: holding(dying, stack, 2) == 1)
        check(load, killed)
        assert holding(dying, stack, 2) == holding(other, stack, 2) == 1
        loads_before_traffic(dying.log_from(mark), len(NAMES))
        truth = {
            (model, prompt): tenant.ask(model, prompt, TOKENS).token_ids
            for model in ("a@v1", "a@v2", "b@v1")
            for prompt in PROMPTS
        }
    whole = [answer for _, answer in load.streamed if not answer.error]
    assert [a for a in whole if a.token_ids != truth[a.model, a.prompt]] == []


def kill_while_answering(server: VllmServer, load: Load) -> float:
    """Kill it while a whole answer is under way on it: seen by holding it, which stops that answer alone. When?"""
    for _ in range(50):
        with server.held():
            until = time.monotonic() + 3
            while time.monotonic() < until:
                if load.asked < time.monotonic() - 2:
                    killed = time.monotonic()
                    server.stop(force=True)
                    return killed
                time.sleep(0.05)
        time.sleep(0.2)  # the other one had it
    raise AssertionError("no whole answer was ever asked of it")


def check(load: Load, killed: float) -> None:
    """Only streams that were being answered by the dead server failed, and they say so."""
    failed = [(asked, answer) for asked, answer in load.streamed if answer.error]
    assert all(asked < killed for asked, _ in failed), failed
    assert len(failed) <= STREAMS
    for _, answer in failed:
        assert answer.status == 200, "nothing had been sent: it should have been tried on the other"
        assert "engine_unavailable" in answer.error
    # Of a whole answer nothing is sent before its end: one that was lost is had from the other server.
    assert [w for w in load.whole if w[2] != 200] == []
    assert any(asked < killed < answered for asked, answered, *_ in load.whole), "one was under way at the kill"
