"""A real vLLM on a CPU as a process of its own, and the service in front of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx2

from service.local import LocalConfig, LocalStack, free_port

MODEL = Path(__file__).parents[2] / "demo" / "model"
BASE = "perennial-demo"
PYTHON = os.environ.get("PERENNIAL_VLLM_PYTHON", "/tmp/vllm-env/bin/python")  # noqa: S108
START_SECONDS = 240.0
OPTIONS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "16",
    "--max-loras", "4", "--max-cpu-loras", "16", "--enable-prefix-caching", "--api-server-count", "1",
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class VllmServer:
    """Always on the same port, so that a restart is the same replica."""

    def __init__(self, log: Path) -> None:
        if not Path(PYTHON).exists():
            raise FileNotFoundError(f"no vLLM at {PYTHON}: set PERENNIAL_VLLM_PYTHON to a Python that has it")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
        command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self.port), *OPTIONS]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, start_new_session=True
            )

    def wait_ready(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx2.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.2)
        raise TimeoutError(f"vLLM did not come up in {START_SECONDS:.0f} s:\n{self.log.read_text()[-3000:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """The whole group: the engine and its workers are processes of their own."""
        if self._process is None:
            return
        os.killpg(self._process.pid, number)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def resident(self) -> int:
        """Bytes of all its processes."""
        assert self._process is not None
        return sum(resident(pid) for pid in group(self._process.pid))

    def models(self) -> dict[str, str]:
        """Served name -> directory."""
        return {m["id"]: m["root"] for m in httpx2.get(f"{self.url}/v1/models", timeout=10.0).json()["data"]}

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=10.0).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def group(leader: int) -> list[int]:
    """Processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def service_for(server: VllmServer, data: Path, settings: Mapping[str, str]) -> LocalStack:
    """The service alone, in front of this engine; not started yet."""
    values = {"PERENNIAL_ENGINE_URL": server.url, "PERENNIAL_RECONCILE_SECONDS": "0.5", **settings}
    return LocalStack(LocalConfig(data, MODEL, BASE, port=0, threads=1, settings=values))


def wait_engine(stack: LocalStack, timeout: float = 60.0) -> None:
    """Until the service says that it has its engine."""
    until = time.monotonic() + timeout
    headers = {"authorization": f"Bearer {stack.api_key}"}
    while time.monotonic() < until:
        assert stack.alive("service"), stack.tail("service")
        try:
            if httpx2.get(f"{stack.url}/readyz", headers=headers, timeout=5.0).json()["parts"]["engine"] == "ok":
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(stack.tail("service"))


assert sys.platform == "linux", "these tests read /proc"
