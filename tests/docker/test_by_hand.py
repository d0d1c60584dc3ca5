"""Every command of the cpu profile, run as Compose would, as plain processes: in order, with its environment alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from demo.client import Client
from demo.tasks import PREFERENCES
from service.local import free_port
from tests.docker import compose

PROFILE = compose.services("cpu")
INNER_PORTS = ("8700", "8701")


@dataclass
class Host:
    """This machine in place of containers: volumes are directories, service names are localhost."""

    root: Path
    ports: dict[str, str] = field(default_factory=lambda: {p: str(free_port()) for p in INNER_PORTS})
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def path(self, source: str) -> Path:
        """Of a named volume or a path beside compose.yaml."""
        if source.startswith((".", "/")):
            return (compose.DOCKER / source).resolve()
        (self.root / "volumes" / source).mkdir(parents=True, exist_ok=True)
        return self.root / "volumes" / source

    def here(self, service: compose.Service, text: object) -> str:
        """The same value with this machine's paths, hosts and ports."""
        found = str(text)
        for inside, (source, _) in compose.mounts(service).items():
            found = re.sub(rf"(?<![\w/.]){inside}(?![\w-])", str(self.path(source)), found)
        for name in PROFILE:
            found = found.replace(f"http://{name}:", "http://127.0.0.1:")
        for inner, ours in self.ports.items():
            found = re.sub(rf"\b{inner}\b", ours, found)
        return found.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - the container's own

    def environment(self, service: compose.Service) -> dict[str, str]:
        given = {k: self.here(service, v) for k, v in service.get("environment", {}).items()}
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(compose.ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.directory("home")),
            "OMP_NUM_THREADS": "1",
            "PERENNIAL_PORT": self.ports["8700"],
            **given,
        }

    def directory(self, name: str) -> Path:
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def start(self, name: str) -> subprocess.Popen[bytes]:
        service = PROFILE[name]
        build = service["build"]
        dockerfile = (compose.DOCKER / build["context"] / build["dockerfile"]).read_text()
        entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.+)", dockerfile, re.MULTILINE)[-1])
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*entrypoint, *(self.here(service, c) for c in service["command"])],
                env=self.environment(service),
                cwd=self.directory("work"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.running[name] = process
        return process

    def await_healthy(self, name: str, timeout: float = 90.0) -> None:
        service, until = PROFILE[name], time.monotonic() + timeout
        command = [self.here(service, c) for c in service["healthcheck"]["test"][1:]]
        while time.monotonic() < until:
            assert self.running[name].poll() is None, self.log(name)
            if subprocess.run(command, env=self.environment(service), capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.2)
        pytest.fail(f"{name} was not healthy after {timeout} s:\n{self.log(name)}")

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()[-2000:]

    def stop(self) -> None:
        for process in reversed(self.running.values()):
            process.terminate()
        for process in self.running.values():
            process.wait(30)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("compose"))
    try:
        for name, service in compose.in_order(PROFILE):
            process = made.start(name)
            if compose.ends(service):
                assert process.wait(60) == 0, made.log(name)
            else:
                made.await_healthy(name)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[Client]:
    key = (host.path("data-cpu") / "client.key").read_text().strip()
    with Client(f"http://127.0.0.1:{host.ports['8700']}", key) as made:
        yield made


@pytest.mark.slow
def test_the_cpu_profile_answers_and_learns(client: Client) -> None:
    assert client.call("GET", "/readyz")["status"] == "ok"
    assert client.chat("perennial-demo", "capital of peru?", temperature=0).text == "lima."
    client.call("POST", "/v1/adapters", json={"name": "helper", "lora": {"rank": 8, "alpha": 16}})
    reply = client.chat("helper", "capital of peru?")
    sent = client.send_feedback([{"completion_id": reply.id, "feedback": PREFERENCES["hope"].remarks[0]}])
    assert client.follow(sent["job_id"], lambda _: None)["version"] == 1
    assert client.chat("helper", "capital of peru?").model == "helper@v1"


@pytest.mark.slow
def test_the_first_run_may_be_run_again(host: Host) -> None:
    keys = [host.path("data-cpu") / "client.key", host.path("worker-key-cpu") / "worker.key"]
    before = [k.read_text() for k in keys]
    assert host.start("init-cpu").wait(60) == 0
    assert [k.read_text() for k in keys] == before


@pytest.mark.slow
def test_nothing_is_written_outside_volumes(host: Host) -> None:
    """The containers' root is read-only: what is written elsewhere here would fail there."""
    for name in ("home", "work"):
        assert list(host.directory(name).iterdir()) == []
    assert os.listdir(host.path("worker-key-cpu")) == ["worker.key"]
