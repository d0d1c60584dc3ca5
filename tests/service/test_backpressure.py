"""Too much at once, a full disk, an end in the middle: refused in time, and nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks import ingest
from service.local import LocalConfig
from tests.service.asgi import Connection, running
from tests.service.harness import Stack, batch, error_of


def test_a_disk_that_is_nearly_full_takes_nothing_new_and_lets_the_old_go_on(make_stack: Callable[..., Stack]) -> None:
    before = make_stack()
    before.alice.create()
    before.alice.feedback("before")
    stack = make_stack(before.engine, min_free_bytes=2**62)
    for path, body in (
        ("/v1/feedback", batch("x")),
        ("/v1/adapters", {"name": "other"}),
        ("/v1/chat/completions", {"model": "helper", "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages", {"model": "helper", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}),
    ):
        answer = before.alice.__class__(stack.client, before.alice.key).post(path, body)
        assert answer.status_code == 503, path
        assert int(answer.headers["retry-after"]) > 0
        if path != "/v1/messages":
            error_of(answer, 503, "disk_full")
    alice = before.alice.__class__(stack.client, before.alice.key)
    upload = alice.request("PUT", "/v1/adapters/helper/upload/adapter_config.json", content=b"{}")
    error_of(upload, 503, "disk_full")
    assert alice.chat(store=False)["choices"]
    assert stack.worker.train() == 1  # what was acknowledged is trained and committed
    assert (stack.count("feedback_batches"), stack.count("adapters")) == (1, 1)


@pytest.mark.anyio
async def test_requests_beyond_the_limit_are_429_and_health_is_not_counted(
    make_context: Callable[..., Any],
) -> None:
    context, _ = make_context(max_requests=3)
    async with running(context, worker=True) as (app, key):
        body = {"worker_id": "w", "base_model": "tiny/base", "wait_seconds": 20}
        waiting = [Connection(app, key, "/worker/v1/leases", body) for _ in range(4)]
        (shed,) = (await asyncio.wait([w.task for w in waiting], return_when=asyncio.FIRST_COMPLETED))[0]
        start, answer = next([w.sent.get_nowait() for _ in range(2)] for w in waiting if w.task is shed)
        assert start["status"] == 429
        assert (b"retry-after", b"1") in start["headers"]
        assert json.loads(answer["body"])["error"]["code"] == "service_busy"
        health = Connection(app, key, "/healthz", None, method="GET")
        await health.task
        assert (await health.sent.get())["status"] == 200
        for each in waiting:
            if each.task is not shed:
                await each.hang_up()


def test_bodies_are_bounded_together(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(max_held_bytes=2000)
    stack.alice.create()
    error_of(stack.alice.post("/v1/feedback", batch("x" * 3000)), 429, "service_busy")
    body = json.dumps(batch("x" * 3000)).encode()
    pieces = (body[i : i + 500] for i in range(0, len(body), 500))
    headers = {"content-type": "application/json"}
    error_of(stack.alice.request("POST", "/v1/feedback", content=pieces, headers=headers), 429, "service_busy")
    for _ in range(5):  # what was held is let go
        assert stack.alice.post("/v1/feedback", batch("x" * 1000)).status_code == 202
    assert stack.count("jobs") == 5


def test_an_end_in_the_middle_of_a_flood_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGTERM to the real process while sixteen clients send: what got its 202 is in the database, and each once."""
    with ingest.synthetic_engine() as engine:
        service = ingest.Service(
            LocalConfig(tmp_path, ingest.ROOT / "demo" / "model", ingest.MODEL, port=0,
                        settings={"PERENNIAL_ENGINE_URL": engine, "PERENNIAL_MAX_QUEUED_JOBS": "100000"})
        )  # fmt: skip
        service.start("service")
        try:
            ingest.wait_for(f"{service.url}/healthz")
            answers = ingest.Answers.stored(service, 400).ids
            acknowledged: dict[str, str] = {}
            enough = threading.Event()

            def flood(share: list[ingest.Sending]) -> None:
                headers = {"authorization": f"Bearer {service.api_key}", "content-type": "application/json"}
                with httpx2.Client(headers=headers) as client:
                    for each in share:
                        try:
                            sent = client.post(
                                f"{service.url}/v1/feedback", content=each.body, headers={"idempotency-key": each.key}
                            )
                        except httpx2.TransportError:
                            return
                        if sent.status_code == 202:
                            acknowledged[each.key] = sent.json()["id"]
                        if len(acknowledged) > 40:
                            enough.set()

            sendings = [ingest.single(a, n) for n, a in enumerate(answers)]
            threads = [threading.Thread(target=flood, args=(sendings[c::16],)) for c in range(16)]
            for thread in threads:
                thread.start()
            assert enough.wait(60)
            service.processes["service"].send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(60)
            assert service.processes["service"].wait(20) is not None
            kept = ingest.batches_by_key(service)
        finally:
            service.stop()
    assert len(acknowledged) < 400
    assert acknowledged.items() <= kept.items()
