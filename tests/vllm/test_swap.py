"""New versions under load, on a real vLLM: no request fails, none is answered by two versions.

The first test writes build/reports/swap.json; `make check-swap` runs it alone, for a whole minute.
"""

from __future__ import annotations

import os
import sqlite3
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
from tests.vllm.waits import ours, wait_live, write_figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Serve = Callable[..., tuple[LocalStack, Tenant]]
CLIENTS, EVERY = 8, 3.0
SECONDS = float(os.environ.get("PERENNIAL_SWAP_SECONDS", "21"))
"""A share of the minute that `make check-swap` runs."""
SWAPS = SECONDS / EVERY - 1
TOKENS = 40


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
    with sqlite3.connect(data / "perennial.db") as rows:
        return {n: str(data / "adapters" / uri / "adapter") for n, uri in rows.execute("SELECT n, uri FROM versions")}


def test_streams_and_a_new_version_every_three_seconds(vllm: VllmServer, serve: Serve) -> None:
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
    counts = {"requests": len(answers), "failed": len(failed), "mixed": len(mixed), "swaps": swaps}
    write_figures("swap", counts | {"seconds": round(seconds, 1)})
    assert not failed, failed[0]
    assert not mixed, (mixed[0], truth[mixed[0].version, mixed[0].prompt])
    # The check itself can see a mix: any other version would have said something else, or less or more surely.
    for prompt in prompts:
        said = [truth[key] for key in truth if key[1] == prompt]
        assert all(apart(a, b) > OTHER for i, a in enumerate(said) for b in said[:i])
    lengths = {len(_prompt_ids(tenant, p)) for p in prompts}
    assert min(lengths) > 256, "longer than two blocks of the CPU build"


def _prompt_ids(tenant: Tenant, prompt: str) -> list[int]:
    body = {"model": "h", "messages": [{"role": "user", "content": prompt}], "max_tokens": 1, "return_token_ids": True}
    return list(tenant.ok("POST", "/v1/chat/completions", json=body)["prompt_token_ids"])


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


def directories(stack: LocalStack) -> list[Path]:
    """Version directories on disk."""
    return list((stack.data / "adapters").glob("adp_*/run_*"))
