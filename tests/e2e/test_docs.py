"""What README and docs tell people to type, typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demo.client import Client
from service.local import free_port
from tests.e2e.conftest import Running
from tests.e2e.test_restart import wait_for

ROOT = Path(__file__).parents[2]


def code_blocks(path: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """One per command: continued lines joined, comments and blank lines left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_the_readme_session_works_as_printed(running: Running, tmp_path: Path) -> None:
    session = next(b for b in code_blocks("README.md") if "export URL=" in b)
    environment = os.environ | {"URL": running.stack.url, "KEY": running.stack.api_key}
    completion = job = ""
    seen = []
    for command in commands(session):
        if command.startswith("export"):
            continue  # the fixture's own URL and key
        filled = command.replace("chatcmpl-...", completion).replace("/jobs/job_...", f"/jobs/{job}")
        done = subprocess.run(["bash", "-c", filled], cwd=tmp_path, env=environment, capture_output=True, check=True)
        seen.append(re.findall(r"\$URL(\S+)", command)[0])
        if command.rstrip().endswith(".zip"):
            assert (tmp_path / "helper-v1.zip").read_bytes()[:2] == b"PK"
            continue
        answer = json.loads(done.stdout)
        assert not answer.get("error"), answer
        completion = answer["id"] if answer["object"] == "chat.completion" else completion
        if answer["object"] == "feedback.batch":
            job = answer["job_id"]
            assert running.client.follow(job, lambda _: None)["version"] == 1
        if answer.get("model") == "helper@v1":
            seen.append(answer["choices"][0]["message"]["content"])
    assert len(seen) == 8
    assert "paris. hope that helps!" in seen


@pytest.mark.slow
def test_the_parts_start_by_hand_as_printed(tmp_path: Path) -> None:
    block = next(b for b in code_blocks("docs/operations.md") if "perennial migrate" in b)
    ports = {"8700": str(free_port()), "8701": str(free_port())}
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PERENNIAL_PORT": ports["8700"],
        "PERENNIAL_ENGINE_URL": f"http://127.0.0.1:{ports['8701']}",
        "PERENNIAL_DATA_DIR": str(tmp_path / "data"),
        "PERENNIAL_MODEL_DIR": str(ROOT / "demo/model"),
        "PERENNIAL_BASE_MODEL": "perennial-demo",
    }
    (tmp_path / "data").mkdir()
    started: list[subprocess.Popen[bytes]] = []
    key = ""

    def here(line: str) -> dict[str, object]:
        return {"args": ["bash", "-c", line], "cwd": tmp_path, "env": environment}

    try:
        for command in commands(block):
            if command.startswith("export"):
                continue
            line = command.replace("perennial-data/", "data/")
            for printed, free in ports.items():
                line = line.replace(printed, free)
            if shlex.split(command)[1] in ("engine", "serve", "worker"):
                with (tmp_path / "log").open("ab") as log:
                    # exec: the signal at the end reaches the part, not a shell around it
                    started.append(subprocess.Popen(**here(f"exec {line}"), stdout=log, stderr=log))  # type: ignore[call-overload]
                continue
            done = subprocess.run(**here(line), capture_output=True, text=True, check=True)  # type: ignore[call-overload]
            key = done.stdout.strip() if "--tenant" in command else key
        with Client(f"http://127.0.0.1:{ports['8700']}", key) as client:
            wait_for(lambda: _ready(client), timeout=240)
            assert client.chat("perennial-demo", "capital of peru?", temperature=0).text == "lima."
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


def _ready(client: Client) -> bool:
    try:
        client.call("GET", "/readyz")
    except Exception:  # not up yet, or 503 while a part is missing
        return False
    return True
