"""Two hosts that share no disk: a worker on one trains what the engine of the other serves.

Host A runs service and engine, host B the worker, which has a URL and a token. Versions are in object storage, rows in
PostgreSQL. The lines between the hosts, and between host A and the storage, can be cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.databases import fresh
from demo.client import Client, Json
from demo.run import BASE_MODEL, MODEL_DIR
from service.local import LocalConfig, LocalStack
from tests.e2e.conftest import Running
from tests.e2e.test_restart import job_of, wait_for
from tests.service import s3
from tests.service.s3 import Link

LEASE = "3"
PATIENCE = 300.0


@dataclass
class Worker:
    """Host B."""

    url: str
    disk: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, token: str) -> None:
        (self.disk / "token").write_text(token)
        with (self.disk / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "worker", "--service-url", self.url, "--token-file", self.disk / "token",
                    "--model", MODEL_DIR, "--base-model", BASE_MODEL, "--adapters-root", self.disk / "adapters",
                    "--worker-id", "host-b", "--device", "cpu", "--threads", "1",
                ],
                env={k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PERENNIAL_"))}
                | {"PERENNIAL_WORKER_OUTAGE_PATIENCE_SECONDS": "0", "PERENNIAL_WORKER_POLL_SECONDS": "0.2"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return (self.disk / "worker.log").read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass
class Hosts:
    a: LocalStack
    b: Worker
    between: Link
    storage: Link
    client: Client

    def send(self, key: str, n: int, seed: int, **training: object) -> Json:
        return Running(self.a, self.client).remark("helper", key, n, seed, **training)

    def served(self, sent: Json, n: int) -> None:
        job = self.client.follow(sent["job_id"], lambda _: None, timeout=PATIENCE)
        assert (job["status"], job["version"]) == ("succeeded", n)
        wait_for(lambda: self.client.chat("helper", "capital of peru?").model == f"helper@v{n}", PATIENCE)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    with ExitStack() as stack:
        endpoint = stack.enter_context(s3.s3_server())
        storage = stack.enter_context(s3.link(endpoint))
        for name, value in s3.environment(storage.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PERENNIAL_DATABASE_URL", stack.enter_context(fresh("postgresql")))
        monkeypatch.setenv("PERENNIAL_STORAGE", s3.make_bucket(endpoint))
        settings = {
            "PERENNIAL_LEASE_SECONDS": LEASE, "PERENNIAL_MAX_ATTEMPTS": "50", "PERENNIAL_RETRY_BACKOFF": "0",
            "PERENNIAL_COALESCE_ITEMS": "1",
        }  # fmt: skip
        a = LocalStack(LocalConfig(tmp_path / "a", MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=settings))
        between = stack.enter_context(s3.link(a.url))
        (tmp_path / "b").mkdir()
        b = Worker(between.url, tmp_path / "b")
        stack.callback(a.stop)
        stack.callback(b.kill)
        a.start("engine", "service")
        b.start((a.data / "worker.key").read_text())
        a.wait_ready(PATIENCE)
        yield Hosts(a, b, between, storage, stack.enter_context(Client(a.url, a.api_key)))


@pytest.mark.slow
@pytest.mark.timeout(900)  # ends in half a minute; what is awaited is never the clock
def test_lines_are_cut_and_healed_and_nothing_is_lost(hosts: Hosts) -> None:
    client, b = hosts.client, hosts.b
    Running(hosts.a, client).create("helper", steps=2)
    sent = [hosts.send("hope", 4, 1)]
    hosts.served(sent[0], 1)

    hosts.storage.cut()
    sent.append(hosts.send("hope", 4, 2))
    wait_for(lambda: "503 storage_unavailable, trying again" in b.log, PATIENCE)
    assert client.chat("helper", "capital of peru?").model == "helper@v1", "answers need no storage"
    hosts.storage.heal()
    hosts.served(sent[1], 2)

    sent.append(hosts.send("hope", 16, 3, steps=32))
    wait_for(lambda: job_of(client, sent[2]["job_id"])["metrics"], PATIENCE)
    hosts.between.cut()
    wait_for(lambda: "service silent for longer than the lease" in b.log, PATIENCE)
    hosts.between.heal()
    hosts.served(sent[2], 3)

    b.kill()
    shutil.rmtree(b.disk / "adapters")
    b.start((hosts.a.data / "worker.key").read_text())
    sent.append(hosts.send("hope", 4, 4))
    hosts.served(sent[3], 4)

    versions = client.call("GET", "/v1/adapters/helper/versions")["data"]
    told = [(v["version"], v["parent"], v["batch_ids"]) for v in versions]
    assert told == [(n, n - 1, [batch["id"]]) for n, batch in enumerate(sent, 1)], "each once, in order"
    assert {p.name for p in (hosts.a.data / "adapters").iterdir()} <= {"cache", "incoming"}, "no disk is shared"
    environment = os.environ | {
        "PERENNIAL_DATA_DIR": str(hosts.a.data),
        "PERENNIAL_MODEL_DIR": str(MODEL_DIR),
        "PERENNIAL_BASE_MODEL": BASE_MODEL,
        "PERENNIAL_ENGINE_URL": f"http://127.0.0.1:{hosts.a.engine_port}",
    }
    looked = subprocess.run(
        [sys.executable, "-m", "service.cli", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    assert looked.returncode == 0, looked.stdout + looked.stderr
    logs = [*(hosts.a.data / "logs").iterdir(), b.disk / "worker.log"]
    assert not [p for p in logs if s3.SECRET in p.read_text()]
