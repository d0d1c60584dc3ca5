"""What several tests wait for, read and write down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

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
