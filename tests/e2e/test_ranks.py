"""A worker of two ranks in the whole stack: one of them killed in the middle, the batch applied once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from demo.client import Client
from tests.e2e.conftest import Running, start
from tests.e2e.test_restart import job_of, wait_for


@pytest.mark.slow
def test_a_rank_killed_mid_training_applies_the_batch_once(tmp_path: Path) -> None:
    settings = {"PERENNIAL_WORKER_RANKS": "2", "PERENNIAL_RETRY_BACKOFF": "0.1"}
    with start(tmp_path, **settings) as stack, Client(stack.url, stack.api_key) as client:
        running = Running(stack, client)
        running.create("twins")
        worker = stack.processes["worker"].pid
        sent = running.remark("twins", "hope", n=16, steps=32, rollouts="own")
        wait_for(lambda: job_of(client, sent["job_id"])["metrics"], timeout=240)
        ranks = [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        job = client.follow(sent["job_id"], lambda _: None, timeout=240)
        assert (job["status"], job["version"], job["attempts"]) == ("succeeded", 1, 1)
        assert stack.processes["worker"].pid == worker, "the supervisor stays"
        versions = client.call("GET", "/v1/adapters/twins/versions")["data"]
        assert [(v["version"], v["batch_ids"]) for v in versions] == [(1, [sent["id"]])]
