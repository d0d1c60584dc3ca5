"""New versions under load, on a real vLLM: no request fails, none is answered by two versions.

The report build/reports/swap.json is written by the first test; `make check-swap` runs it alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from service.local import LocalStack
from tests.vllm.server import VllmServer, resident
from tests.vllm.tenant import Answer, Tenant, long_prompt, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Serve = Callable[..., tuple[LocalStack, Tenant]]
REPORT = Path(__file__).parents[2] / "build" / "reports" / "swap.json"
CLIENTS, SECONDS, EVERY = 8, 60.0, 3.0
SWAPS = SECONDS / EVERY - 1
TOKENS = 40


def wait_live(tenant: Tenant, name: str, n: int, timeout: float = 120.0) -> None:
    until = time.monotonic() + timeout
    while tenant.live(name) != n:
        assert time.monotonic() < until, f"version {n} of {name} was not served in {timeout:.0f} s"
        time.sleep(0.02)


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


Truth = tuple[list[int], list[float]]
"""Token ids and their log-probs."""
SAME, OTHER = 1e-3, 1e-2
"""Log-probs of one version in two batches differ by less than the first, of two versions by more than the second."""


def replay(vllm: VllmServer, data: Path, asked: set[tuple[int, str]]) -> dict[tuple[int, str], Truth]:
    """Greedy answers of the engine itself, each version under a name that the service never used.

    Another name is another prefix cache: nothing of the run under test can be reused.
    """
    roots = _roots(data)
    found: dict[tuple[int, str], Truth] = {}
    with httpx2.Client(base_url=vllm.url, timeout=120.0) as http, ThreadPoolExecutor(4) as pool:
        for n in sorted({n for n, _ in asked}):
            name = f"replay-{time.monotonic_ns()}-{n}"
            http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": roots[n]}).raise_for_status()
            prompts = sorted(p for m, p in asked if m == n)
            for prompt, said in zip(prompts, pool.map(lambda p, m=name: _greedy(http, m, p), prompts), strict=True):
                found[n, prompt] = said
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    return found


def _greedy(http: httpx2.Client, model: str, prompt: str) -> Truth:
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0,
        "return_token_ids": True, "logprobs": True,
    }  # fmt: skip
    answer = http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return list(choice["token_ids"]), [entry["logprob"] for entry in choice["logprobs"]["content"]]


def apart(a: Truth, b: Truth) -> float:
    """Largest difference of log-probs; infinite when the tokens are others."""
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return float("inf")
    return max(abs(x - y) for x, y in zip(a[1], b[1], strict=True))


def _roots(data: Path) -> dict[int, str]:
    """Directory of every version, read from the database."""
    import sqlite3

    with sqlite3.connect(data / "perennial.db") as rows:
        return {n: str(data / "adapters" / uri / "adapter") for n, uri in rows.execute("SELECT n, uri FROM versions")}


def test_sixty_seconds_of_streams_and_a_new_version_every_three(vllm: VllmServer, serve: Serve) -> None:
    stack, tenant = serve(perennial_drain_seconds="1")
    tenant.create("h")
    wait_live(tenant, "h", tenant.upload("h", weights(0)))
    prompts = [long_prompt(i) for i in range(4)]
    answers: list[Answer] = []
    over = threading.Event()

    def client(number: int) -> None:
        turn = number
        while not over.is_set():
            answers.append(tenant.ask("h", prompts[turn % len(prompts)], TOKENS))
            turn += 1

    began, swaps = time.monotonic(), 0
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, i) for i in range(CLIENTS)]
        try:
            # On a slow machine longer, until there is as much to judge.
            while time.monotonic() - began < SECONDS or swaps < SWAPS or len(answers) <= 4 * CLIENTS:
                wait_live(tenant, "h", tenant.upload("h", weights(swaps + 1)))
                swaps += 1
                time.sleep(max(0.0, began + swaps * EVERY - time.monotonic()))
        finally:
            over.set()
        for done in running:
            done.result()
    seconds = time.monotonic() - began
    failed = [a for a in answers if a.error]
    good = [a for a in answers if not a.error]
    truth = replay(vllm, stack.data, {(a.version, a.prompt) for a in good})
    mixed = [a for a in good if apart((a.token_ids, a.logprobs), truth[a.version, a.prompt]) > SAME]
    write_report(requests=len(answers), failed=len(failed), mixed=len(mixed), swaps=swaps, seconds=round(seconds, 1))
    assert not failed, failed[0]
    assert not mixed, (mixed[0], truth[mixed[0].version, mixed[0].prompt])
    # The check itself can see a mix: any other version would have said something else, or less or more surely.
    for prompt in prompts:
        said = [truth[key] for key in truth if key[1] == prompt]
        assert all(apart(a, b) > OTHER for i, a in enumerate(said) for b in said[:i])
    counts = {len(_prompt_ids(tenant, p)) for p in prompts}
    assert min(counts) > 256, "longer than two blocks of the CPU build"


def _prompt_ids(tenant: Tenant, prompt: str) -> list[int]:
    body = {"model": "h", "messages": [{"role": "user", "content": prompt}], "max_tokens": 1, "return_token_ids": True}
    return list(tenant.ok("POST", "/v1/chat/completions", json=body)["prompt_token_ids"])


def write_report(**figures: float) -> None:
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=1) + "\n")


def test_a_hundred_versions_leave_nothing_behind(vllm: VllmServer, serve: Serve) -> None:
    keep = 5
    stack, tenant = serve(
        perennial_drain_seconds="0", perennial_keep_versions=str(keep), perennial_retention_grace_seconds="0"
    )
    tenant.create("h")
    service = stack.processes["service"].pid
    sizes: dict[int, tuple[float, float]] = {}
    for n in range(1, 101):
        assert tenant.upload("h", weights(1000 + n)) == n
        wait_live(tenant, "h", n)
        assert not tenant.ask("h", "which boat is it?", 8).error
        if n % 20 == 0:
            sizes[n] = (vllm.resident_bytes() / 2**20, resident(service) / 2**20)
    write_figures("hundred", {n: {"vllm_mib": round(v, 1), "service_mib": round(s, 1)} for n, (v, s) in sizes.items()})
    # From the twentieth on: what is allocated once is allocated by then.
    assert sizes[100][0] - sizes[20][0] < 64, sizes
    assert sizes[100][1] - sizes[20][1] < 24, sizes
    until = time.monotonic() + 120
    while time.monotonic() < until and (len(ours(vllm, stack)) > 1 or len(directories(stack)) > keep):
        time.sleep(0.2)
    assert [name.rsplit("-v", 1)[1] for name in ours(vllm, stack)] == ["100"]
    assert len(directories(stack)) == keep
    assert tenant.ask("h@v99", "which boat is it?", 8).error == ""
    assert tenant.ask("h@v1", "which boat is it?", 8).status == 410


def ours(vllm: VllmServer, stack: LocalStack) -> list[str]:
    """What this service has loaded: the server is shared, and each service leaves the others' adapters alone."""
    return [name for name, root in vllm.models().items() if root.startswith(f"{stack.data}/")]


def directories(stack: LocalStack) -> list[Path]:
    """Version directories on disk."""
    return list((stack.data / "adapters").glob("adp_*/run_*"))


def write_figures(name: str, figures: object) -> None:
    path = REPORT.with_name(f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def test_cached_prefixes_of_one_version_never_answer_for_another(vllm: VllmServer, serve: Serve) -> None:
    """The same long prompt before and after a swap, then the same versions on a server that has cached nothing."""
    _, tenant = serve(perennial_drain_seconds="0")
    tenant.create("h")
    wait_live(tenant, "h", tenant.upload("h", weights(31)))
    prompt = long_prompt(3)
    before = tenant.ask("h", prompt, TOKENS)
    hits = vllm.metric("vllm:prefix_cache_hits_total")
    assert tenant.ask("h", prompt, TOKENS).token_ids == before.token_ids
    assert vllm.metric("vllm:prefix_cache_hits_total") >= hits + 256, "the cache was in use"
    wait_live(tenant, "h", tenant.upload("h", weights(32)))
    after = tenant.ask("h", prompt, TOKENS)
    assert (before.version, after.version) == (1, 2)
    vllm.stop(force=True)
    vllm.start()
    vllm.wait_healthy()
    fresh = {n: answered(tenant, f"h@v{n}", prompt) for n in (2, 1)}
    assert fresh[1].token_ids == before.token_ids
    assert fresh[2].token_ids == after.token_ids
    assert before.token_ids != after.token_ids
    assert vllm.metric("vllm:prefix_cache_hits_total") < 256, "the fresh server had nothing to reuse"


def answered(tenant: Tenant, model: str, prompt: str) -> Answer:
    """The first answer that is not a 503."""
    until = time.monotonic() + 180
    while (answer := tenant.ask(model, prompt, TOKENS)).status == 503 and time.monotonic() < until:
        time.sleep(0.2)
    assert not answer.error, answer
    return answer


def test_an_engine_killed_under_load_comes_back_by_itself(vllm: VllmServer, serve: Serve) -> None:
    _, tenant = serve()
    names = ["a", "b", "c"]
    for i, name in enumerate(names):
        tenant.create(name)
        wait_live(tenant, name, tenant.upload(name, weights(60 + i)))
    prompt = long_prompt(5, words=60)
    truth = {name: tenant.ask(name, prompt, 12).token_ids for name in names}
    seen: list[tuple[float, str, httpx2.Response]] = []
    over = threading.Event()

    def client(name: str) -> None:
        body = {
            "model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0,
            "return_token_ids": True, "store": False,
        }  # fmt: skip
        while not over.is_set():
            answer = tenant.send("POST", "/v1/chat/completions", json=body)
            seen.append((time.monotonic(), name, answer))
            if answer.status_code != 200:
                time.sleep(0.05)

    def answered_since(moment: float) -> set[str]:
        return {name for at, name, answer in list(seen) if at > moment and answer.status_code == 200}

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client, name) for name in [*names, "a"]]
        try:
            wait_for(lambda: len(seen) > 8)
            killed = time.monotonic()
            vllm.stop(force=True)
            mark = vllm.logged()  # what comes behind it was written by the next server
            wait_for(lambda: any(answer.status_code != 200 for *_, answer in seen))
            vllm.start()
            vllm.wait_healthy()
            ready = time.monotonic()
            wait_for(lambda: answered_since(ready) == set(names))
            whole = time.monotonic()
            wait_for(lambda: sum(at > whole for at, *_ in seen) > 24)
        finally:
            over.set()
        for done in running:
            done.result()
    wrong = [(name, a.text) for _, name, a in seen if a.status_code == 200 and ids_of(a) != truth[name]]
    assert wrong == []
    refused = [(at, a) for at, _, a in seen if a.status_code != 200]
    assert refused, "it was down"
    assert {a.status_code for _, a in refused} == {503}
    assert all(int(a.headers["retry-after"]) > 0 for _, a in refused)
    assert {a.json()["error"]["code"] for _, a in refused} <= {"engine_unavailable"}
    # Requests in flight at the kill were sent before it and answered after it.
    assert min(at for at, _ in refused) >= killed
    assert max(at for at, _ in refused) < whole, "once it is back it stays"
    loads_before_traffic(vllm.log_from(mark), len(names))


def ids_of(answer: httpx2.Response) -> list[int]:
    return list(answer.json()["choices"][0]["token_ids"])


def loads_before_traffic(log: str, count: int) -> None:
    """By vLLM's own access log: every live version was loaded before the first chat."""
    calls = [line for line in log.splitlines() if '"POST /v1/' in line and "200 OK" in line]
    first_chat = next(i for i, line in enumerate(calls) if "/v1/chat/completions" in line)
    assert sum("/v1/load_lora_adapter" in line for line in calls[:first_chat]) >= count, calls[:20]
