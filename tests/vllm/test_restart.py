"""A real vLLM is killed under load and started again; what it had cached before says the same as what it computes anew.

One restart shows both: a start of the server takes up to a minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import pytest

from tests.vllm.conftest import stack_before
from tests.vllm.server import VllmServer, wait_engine
from tests.vllm.tenant import Answer, Tenant, long_prompt, weights
from tests.vllm.waits import loads_before_traffic, wait_for, wait_live

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ["a", "b", "c"]
UNDER_LOAD = long_prompt(5, words=60)
LONG = long_prompt(3)
TOKENS = 40
HITS = "vllm:prefix_cache_hits_total"


@pytest.fixture(scope="module")
def tenant(vllm: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    local = stack_before(vllm, tmp_path_factory.mktemp("restart"))
    try:
        local.start("service")
        wait_engine(local)
        made = Tenant(local.url, local.api_key)
        yield made
        made.close()
    finally:
        local.stop()


@dataclass(frozen=True)
class Cached:
    """The same long prompt before and after a swap, on a server that had cached it."""

    before: Answer
    again: Answer
    after: Answer
    hits: float
    """Tokens of `again` that came from the cache."""


@pytest.fixture(scope="module")
def cached(vllm: VllmServer, tenant: Tenant) -> Cached:
    tenant.create("h")
    wait_live(tenant, "h", tenant.upload("h", weights(31)))
    before = tenant.ask("h", LONG, TOKENS)
    hits = vllm.metric(HITS)
    again = tenant.ask("h", LONG, TOKENS)
    hits = vllm.metric(HITS) - hits
    wait_live(tenant, "h", tenant.upload("h", weights(32)))
    return Cached(before, again, tenant.ask("h", LONG, TOKENS), hits)


@dataclass
class Outage:
    """What clients saw, and when: monotonic times."""

    truth: dict[str, list[int]]
    """Token ids of each adapter's greedy answer."""
    seen: list[tuple[float, str, httpx2.Response]] = field(default_factory=list)
    killed: float = 0.0
    whole: float = 0.0
    """Every adapter has been answered again."""
    log: str = ""
    """Of the server that came back."""

    def answered_since(self, moment: float) -> set[str]:
        return {name for at, name, answer in list(self.seen) if at > moment and answer.status_code == 200}


@pytest.fixture(scope="module")
def outage(vllm: VllmServer, tenant: Tenant, cached: Cached) -> Outage:
    """Killed and started again while four clients ask. After `cached`, so that nothing of it is left in the server."""
    for i, name in enumerate(NAMES):
        tenant.create(name)
        wait_live(tenant, name, tenant.upload(name, weights(60 + i)))
    out = Outage({name: tenant.ask(name, UNDER_LOAD, 12).token_ids for name in NAMES})
    over = threading.Event()

    def client(name: str) -> None:
        body = {
            "model": name, "messages": [{"role": "user", "content": UNDER_LOAD}], "max_tokens": 12, "temperature": 0,
            "return_token_ids": True, "store": False,
        }  # fmt: skip
        while not over.is_set():
            answer = tenant.send("POST", "/v1/chat/completions", json=body)
            out.seen.append((time.monotonic(), name, answer))
            if answer.status_code != 200:
                over.wait(0.25)  # the server that starts needs the cores

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client, name) for name in [*NAMES, "a"]]
        try:
            wait_for(lambda: len(out.seen) > 8)
            out.killed = time.monotonic()
            vllm.stop(force=True)
            mark = vllm.logged()  # what comes behind it was written by the next server
            wait_for(lambda: any(answer.status_code != 200 for *_, answer in out.seen))
            vllm.start()
            vllm.wait_healthy()
            ready = time.monotonic()
            wait_for(lambda: out.answered_since(ready) == set(NAMES))
            out.whole = time.monotonic()
            wait_for(lambda: sum(at > out.whole for at, *_ in out.seen) > 24)
        finally:
            over.set()
        for done in running:
            done.result()
    out.log = vllm.log_from(mark)
    return out


def test_an_engine_killed_under_load_comes_back_by_itself(outage: Outage) -> None:
    good = [(name, answer) for _, name, answer in outage.seen if answer.status_code == 200]
    assert [(name, a.text) for name, a in good if ids_of(a) != outage.truth[name]] == []
    refused = [(at, a) for at, _, a in outage.seen if a.status_code != 200]
    assert refused, "it was down"
    assert {a.status_code for _, a in refused} == {503}
    assert all(int(a.headers["retry-after"]) > 0 for _, a in refused)
    assert {a.json()["error"]["code"] for _, a in refused} <= {"engine_unavailable"}
    # Requests in flight at the kill were sent before it and answered after it.
    assert min(at for at, _ in refused) >= outage.killed
    assert max(at for at, _ in refused) < outage.whole, "once it is back it stays"
    loads_before_traffic(outage.log, len(NAMES))


def ids_of(answer: httpx2.Response) -> list[int]:
    return list(answer.json()["choices"][0]["token_ids"])


def test_cached_prefixes_of_one_version_never_answer_for_another(
    vllm: VllmServer, tenant: Tenant, cached: Cached, outage: Outage
) -> None:
    """The same versions on the server that was started since, and has computed nothing of this prompt."""
    assert cached.hits >= 256, "the cache was in use"
    assert cached.again.token_ids == cached.before.token_ids
    assert (cached.before.version, cached.after.version) == (1, 2)
    hits = vllm.metric(HITS)
    fresh = {n: tenant.ask(f"h@v{n}", LONG, TOKENS) for n in (2, 1)}
    assert not any(answer.error for answer in fresh.values()), fresh
    assert vllm.metric(HITS) == hits, "the fresh server had nothing to reuse"
    assert fresh[1].token_ids == cached.before.token_ids
    assert fresh[2].token_ids == cached.after.token_ids
    assert cached.before.token_ids != cached.after.token_ids
