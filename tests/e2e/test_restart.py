"""Everything killed in the middle of training: the job finishes, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.client import Client, Json
from tests.e2e.conftest import Running, start

LEASE = "2"


def wait_for(condition: Callable[[], object], timeout: float = 60.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def job_of(client: Client, job_id: str) -> Json:
    return client.call("GET", f"/v1/jobs/{job_id}")


@pytest.mark.slow
def test_kill_9_of_everything_mid_training_applies_the_batch_once(tmp_path: Path) -> None:
    with (
        start(tmp_path, PERENNIAL_LEASE_SECONDS=LEASE) as stack,
        Client(stack.url, stack.api_key) as client,
    ):
        running = Running(stack, client)
        running.create("phoenix")
        first = running.remark("phoenix", "hope", n=64, steps=64)
        second = running.remark("phoenix", "hope", n=8, seed=5)
        wait_for(lambda: len(job_of(client, first["job_id"])["metrics"]) >= 2)
        assert job_of(client, first["job_id"])["status"] == "running"
        stack.stop(force=True)

        stack.start()
        stack.wait_ready()
        jobs = [client.follow(sent["job_id"], lambda _: None, timeout=120) for sent in (first, second)]
        assert [(j["status"], j["version"]) for j in jobs] == [("succeeded", 1), ("succeeded", 2)]
        assert jobs[0]["attempts"] >= 1, "the killed worker counts"
        versions = client.call("GET", "/v1/adapters/phoenix/versions")["data"]
        assert [(v["version"], v["parent"], v["batch_ids"]) for v in versions] == [
            (1, 0, [first["id"]]),
            (2, 1, [second["id"]]),
        ]


@pytest.mark.slow
def test_an_engine_that_was_killed_serves_the_same_version_again(tmp_path: Path) -> None:
    with start(tmp_path) as stack, Client(stack.url, stack.api_key) as client:
        running = Running(stack, client)
        running.create("lazarus")
        running.learn("lazarus", "hope")
        before = client.chat("lazarus", "capital of peru?", temperature=0)
        stack.stop("engine", force=True)
        stack.start("engine")
        stack.wait_ready()
        after = client.chat("lazarus", "capital of peru?", temperature=0)
        assert (after.model, after.text) == (before.model, before.text) == ("lazarus@v1", before.text)
