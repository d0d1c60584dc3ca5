"""A client that goes away ends its generation in the embedded engine."""

from __future__ import annotations

import re

import httpx2
import pytest

from demo.run import BASE_MODEL
from tests.e2e.conftest import Running
from tests.e2e.test_restart import wait_for

TOKENS = 900
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
    url = f"{running.stack.url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {running.stack.api_key}"}
    body = BODY | {"stream": stream}
    if stream:
        with httpx2.Client() as client, client.stream("POST", url, json=body, headers=headers) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url, json=body, headers=headers, timeout=0.2)
    wait_for(lambda: engine_counts(running)[0] == 0, timeout=10)
    assert engine_counts(running)[1] - before < TOKENS
