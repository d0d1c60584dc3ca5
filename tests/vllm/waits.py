"""What several tests wait for, read and write down."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from service.local import LocalStack
from tests.vllm.server import VllmServer
from tests.vllm.tenant import Tenant

REPORTS = Path(__file__).parents[2] / "build" / "reports"


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


def ours(vllm: VllmServer, stack: LocalStack) -> list[str]:
    """What this service has loaded: the server is shared, and each service leaves the others' adapters alone."""
    return [name for name, root in vllm.models().items() if root.startswith(f"{stack.data}/")]


def loads_before_traffic(log: str, count: int) -> None:
    """By vLLM's own access log: every live version was loaded before the first chat."""
    calls = [line for line in log.splitlines() if '"POST /v1/' in line and "200 OK" in line]
    first_chat = next(i for i, line in enumerate(calls) if "/v1/chat/completions" in line)
    assert sum("/v1/load_lora_adapter" in line for line in calls[:first_chat]) >= count, calls[:20]


def write_figures(name: str, figures: object) -> None:
    path = REPORTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def records(stack: LocalStack) -> list[dict[str, Any]]:
    """What the trainer recorded for the canary, version by version."""
    with sqlite3.connect(stack.data / "perennial.db") as rows:
        return [json.loads(canary) for (canary,) in rows.execute("SELECT canary FROM versions ORDER BY n")]


def scored(vllm: VllmServer, model: str, ids: list[int]) -> list[float]:
    """vLLM's own log-probs of a prompt's tokens after the first."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx2.post(f"{vllm.url}/v1/completions", json=body, timeout=60.0)
    rows = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [row[str(token)]["logprob"] for token, row in zip(ids[1:], rows, strict=True)]
