"""A client that goes away ends its generation in the embedded engine."""

from __future__ import annotations

import http.client
import json
import re

import httpx2
import pytest

from demo.run import BASE_MODEL
from tests.e2e.conftest import Running
from tests.e2e.test_restart import wait_for

TOKENS = 900
"""So many that the news is there long before the end, on a slow machine too: both take longer there."""
BODY = {
    "model": BASE_MODEL, "messages": [{"role": "user", "content": "opposite of hot?"}], "max_tokens": TOKENS,
    "ignore_eos": True,
}  # fmt: skip


def engine_counts(running: Running) -> tuple[int, int]:
    """Generations that run, and tokens generated so far."""
    shown = httpx2.get(f"http://127.0.0.1:{running.stack.engine_port}/metrics").text
    names = ("vllm:num_requests_running", "vllm:generation_tokens_total")
    busy, tokens = (int(re.findall(rf"^{name} (\d+)$", shown, re.MULTILINE)[0]) for name in names)
    return busy, tokens


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_generation(running: Running, stream: bool) -> None:
    _, before = engine_counts(running)
    client = http.client.HTTPConnection("127.0.0.1", running.stack.port, timeout=120)
    headers = {"authorization": f"Bearer {running.stack.api_key}", "content-type": "application/json"}
    client.request("POST", "/v1/chat/completions", json.dumps(BODY | {"stream": stream}), headers)
    if stream:
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
    else:
        wait_for(lambda: engine_counts(running)[0] > 0 and engine_counts(running)[1] > before + 2)
    client.close()
    wait_for(lambda: engine_counts(running)[0] == 0, timeout=240)
    assert engine_counts(running)[1] - before < TOKENS
