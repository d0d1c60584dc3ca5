"""Two engines as processes: one is killed under load and comes back; nobody is asked for what it does not have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from demo.run import BASE_MODEL, MODEL_DIR
from service.local import LocalConfig, LocalStack, free_port
from tests.vllm.server import wait_engine
from tests.vllm.tenant import Tenant, weights

pytestmark = pytest.mark.slow
PATIENCE = 200.0
"""Seconds; on a busy machine an engine starts slowly."""


class EngineProcess:
    """The embedded engine, always on the same port."""

    def __init__(self, root: Path, log: Path) -> None:
        self.port, self._root, self._log = free_port(), root, log
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "worker.engine", "--model", str(MODEL_DIR), "--served-model-name", BASE_MODEL,
            "--port", str(self.port), "--adapters-root", str(self._root), "--device", "cpu", "--threads", "1",
        ]  # fmt: skip
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        eventually(self.answers)

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def generated(self) -> int:
        lines = httpx2.get(f"{self.url}/metrics", timeout=5.0).text.splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    def models(self) -> set[str]:
        return {m["id"] for m in httpx2.get(f"{self.url}/v1/models", timeout=5.0).json()["data"]} - {BASE_MODEL}


def eventually(what: Callable[[], bool], timeout: float = PATIENCE) -> None:
    until = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[EngineProcess]]:
    made = [EngineProcess(tmp_path / "data" / "adapters", tmp_path / f"engine-{i}.log") for i in range(2)]
    (tmp_path / "data" / "adapters").mkdir(parents=True)
    try:
        for engine in made:
            engine.start()
        yield made
    finally:
        for engine in made:
            engine.stop()


@pytest.fixture
def tenant(engines: list[EngineProcess], tmp_path: Path) -> Iterator[Tenant]:
    urls = ",".join(e.url for e in engines)
    settings = {"PERENNIAL_ENGINE_URLS": urls, "PERENNIAL_RECONCILE_SECONDS": "0.5"}
    stack = LocalStack(LocalConfig(tmp_path / "data", MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=settings))
    stack.start("service")
    try:
        wait_engine(stack)
        tenant = Tenant(stack.url, stack.api_key)
        yield tenant
        tenant.close()
    finally:
        stack.stop()


def test_an_engine_killed_under_load_leaves_its_traffic_to_the_other(
    engines: list[EngineProcess], tenant: Tenant
) -> None:
    tenant.create("h")
    tenant.upload("h", weights(1))
    eventually(lambda: tenant.live("h") == 1 and all(len(e.models()) == 1 for e in engines))
    prompts = [f"capital of country {i}?" for i in range(8)]
    truth = {p: tenant.ask("h", p, 12).token_ids for p in prompts}
    assert all(e.generated() > 0 for e in engines), "both take traffic"
    failures: list[tuple[float, httpx2.Response]] = []
    wrong: list[str] = []
    over = threading.Event()

    def client(number: int) -> None:
        turn = number
        while not over.is_set():
            prompt = prompts[turn % len(prompts)]
            body = {
                "model": "h", "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0,
                "return_token_ids": True, "store": False,
            }  # fmt: skip
            answer = tenant.send("POST", "/v1/chat/completions", json=body)
            if answer.status_code != 200:
                failures.append((time.monotonic(), answer))
            elif answer.json()["choices"][0]["token_ids"] != truth[prompt]:
                wrong.append(answer.text)
            turn += 1
            time.sleep(0.05)  # leave the machine some room to start an engine in

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client, i) for i in range(4)]
        try:
            time.sleep(1.0)
            killed = time.monotonic()
            engines[0].stop(signal.SIGKILL)
            time.sleep(2.0)
            engines[0].start()
            eventually(lambda: len(engines[0].models()) == 1)
            before = engines[0].generated()
            eventually(lambda: engines[0].generated() > before + 20)
        finally:
            over.set()
        for done in running:
            done.result()
    assert wrong == []
    assert len(failures) <= 4, "those in flight on it, each once"
    for at, answer in failures:
        assert killed <= at < killed + 60.0
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) > 0
