"""A preview through the front door and through the command, with the real worker and model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from demo.client import Json
from tests.e2e.conftest import Running

ITEM = {"messages": [{"role": "user", "content": "capital of peru?"}], "response": "lima."}
BATCH: Json = {
    "adapter": "looked",
    "items": [ITEM | {"feedback": "in capitals, please"}, ITEM | {"feedback": "ok"}],
}


def ended(running: Running, job_id: str) -> Json:
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        job = running.client.call("GET", f"/v1/jobs/{job_id}")
        if job["status"] not in ("queued", "running"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def test_a_preview_tells_what_would_be_learnt_and_learns_nothing(running: Running, tmp_path: Path) -> None:
    running.create("looked")
    sent = running.client.call("POST", "/v1/feedback/preview", json=BATCH)
    job = ended(running, sent["id"])
    assert (job["kind"], job["status"], job["version"]) == ("preview", "succeeded", None)
    loud, nothing = job["result"]["items"]
    assert (loud["acts"], nothing["acts"]) == (True, False)
    assert loud["tokens"][0]["instead"]["text"] == "LIMA"
    adapter = running.client.call("GET", "/v1/adapters/looked")
    assert (adapter["head_version"], adapter["live_version"], adapter["queued_jobs"]) == (0, 0, 0)
    assert running.client.call("GET", "/v1/adapters/looked/versions")["data"] == []

    file = tmp_path / "batch.json"
    file.write_text(json.dumps(BATCH))
    environment = os.environ | {"PERENNIAL_URL": running.stack.url, "PERENNIAL_API_KEY": running.stack.api_key}
    command = [sys.executable, "-m", "service.cli", "feedback", "preview"]
    done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("item 1: the teacher acts on it; 33% of 3 tokens moved")
    assert '"lima"' in lines[1]
    assert 'wants "LIMA"' in lines[1]
    assert lines[2].startswith("item 2: the teacher does not act on it; 0% of 3 tokens moved")
    file.write_text("{not json")
    refused = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, "cannot be read as JSON" in refused.stderr) == (1, True)
    assert "Traceback" not in refused.stderr
