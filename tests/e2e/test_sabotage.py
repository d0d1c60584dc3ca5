"""A real worker whose clock is an hour wrong and whose disk fills up while it publishes: nothing is lost."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from demo.client import Client
from tests.e2e.conftest import Running, start
from tests.e2e.test_restart import job_of, wait_for

pytestmark = pytest.mark.slow
HOUR = 3600.0


def test_a_clock_that_is_wrong_and_a_disk_that_is_full_lose_nothing(tmp_path: Path) -> None:
    full = tmp_path / "the disk is full"
    sabotage = {
        "PYTHONPATH": str(Path(__file__).parent / "sabotage"),
        "SABOTAGE_CLOCK": str(HOUR),
        "SABOTAGE_DISK": str(full),
        "PERENNIAL_LEASE_SECONDS": "2",
        "PERENNIAL_RETRY_BACKOFF": "0.1",
        "PERENNIAL_MAX_ATTEMPTS": "1000",
    }
    with start(tmp_path / "data", **sabotage) as stack, Client(stack.url, stack.api_key) as client:
        running = Running(stack, client)
        running.create("hourly")
        began = time.time()
        full.touch()
        sent = running.remark("hourly", "hope", n=2, steps=2)
        wait_for(lambda: (job_of(client, sent["job_id"])["error"] or {}).get("code") == "disk_full")
        tried = job_of(client, sent["job_id"])
        assert "make room" in tried["error"]["message"]
        assert client.call("GET", "/v1/adapters/hourly")["head_version"] == 0
        full.unlink()
        job = client.follow(sent["job_id"], lambda _: None, timeout=120)

        assert (job["status"], job["version"]) == ("succeeded", 1)
        assert client.chat("hourly", "capital of peru?").model == "hourly@v1"
        [adapter] = (stack.data / "adapters").glob("adp_*")
        assert len([p for p in adapter.iterdir() if not p.name.startswith(".uploads")]) == 1, "no try left anything"
        times = [job[name] for name in ("created_at", "started_at", "finished_at")]
        assert times == sorted(times)
        assert int(began) <= times[0] <= times[-1] <= time.time(), "the database's clock is the one that counts"
        logged = datetime.fromisoformat((stack.data / "logs" / "worker.log").read_text()[:19]).astimezone()
        assert logged.timestamp() > began + HOUR / 2, "the worker's clock was wrong"
