"""The whole stack on one machine: service, worker and embedded engine as processes of their own.

Used by `perennial up`, the demonstration and the end-to-end tests. A part that dies is started again; everything that
was acknowledged is on disk.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from service import first_run
from service.settings import Settings

PARTS = ("engine", "service", "worker")
PR_SET_PDEATHSIG = 1


class PartFailed(Exception):
    """A part of the stack did not come up; the message says which and where its log is."""


@dataclass(frozen=True)
class LocalConfig:
    data_dir: Path
    model_dir: Path
    base_model: str
    host: str = "127.0.0.1"
    port: int = 8700
    threads: int = max(1, (os.cpu_count() or 2) // 2)
    """Per part that computes."""
    device: str = "auto"
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further `PERENNIAL_*` values for the service."""


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_memory(model_dir: Path, device: str) -> None:
    """Raises PartFailed, with the plan, where engine and worker cannot fit together (`perennial preflight`)."""
    command = [sys.executable, "-m", "worker.preflight", "--model", str(model_dir), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our module
    if done.returncode == 1:
        raise PartFailed(done.stderr.strip())


def taken(host: str, port: int) -> bool:
    """Whether somebody listens there already: their answers would be taken for ours."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
        return False


class LocalStack:
    """Start, watch and stop the parts. Also a context manager."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self.data = config.data_dir.absolute()
        self.port = config.port or free_port()
        self.engine_port = free_port()
        self.url = f"http://{config.host}:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._prepare()

    def _prepare(self) -> None:
        (self.data / "logs").mkdir(parents=True, exist_ok=True)
        self.data.chmod(0o700)  # the database holds prompts and remarks
        self.api_key = first_run.prepare(self._settings(), self.data / "client.key", self.data / "worker.key")

    def _settings(self) -> Settings:
        return Settings.model_validate({"data_dir": self.data})

    def _commands(self) -> dict[str, list[str]]:
        c, adapters = self.config, str(self.data / "adapters")
        compute = ["--device", c.device, "--threads", str(c.threads)]
        return {
            "engine": [
                "-m", "worker.engine", "--model", str(c.model_dir), "--served-model-name", c.base_model,
                "--host", "127.0.0.1", "--port", str(self.engine_port), "--adapters-root", adapters, *compute,
            ],
            "service": ["-m", "service.cli", "serve"],
            "worker": [
                "-m", "worker", "--service-url", self.url, "--token-file", str(self.data / "worker.key"),
                "--model", str(c.model_dir), "--base-model", c.base_model, "--adapters-root", adapters,
                "--worker-id", "local", *compute,
            ],
        }  # fmt: skip

    def _environment(self) -> dict[str, str]:
        c = self.config
        return {
            **os.environ,
            "PERENNIAL_DATA_DIR": str(self.data),
            "PERENNIAL_MODEL_DIR": str(c.model_dir.absolute()),
            "PERENNIAL_BASE_MODEL": c.base_model,
            "PERENNIAL_ENGINE_URL": f"http://127.0.0.1:{self.engine_port}",
            "PERENNIAL_HOST": c.host,
            "PERENNIAL_PORT": str(self.port),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **c.settings,
        }

    def start(self, *parts: str) -> None:
        """Start these parts (all by default); what runs already is left alone."""
        commands, environment = self._commands(), self._environment()
        # The credentials of the object storage are the service's alone.
        without = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
        for part in parts or PARTS:
            if self.alive(part):
                continue
            with (self.data / "logs" / f"{part}.log").open("ab") as log:
                self.processes[part] = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                    [sys.executable, *commands[part]],
                    env=environment if part == "service" else without,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C comes to us alone, and we stop the parts in order
                    preexec_fn=_die_with_parent,
                )

    def alive(self, part: str) -> bool:
        process = self.processes.get(part)
        return process is not None and process.poll() is None

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Until `/readyz` says that database, engine and worker are there. Raises PartFailed."""
        until = time.monotonic() + timeout
        last = "no answer"
        while time.monotonic() < until:
            if dead := [p for p in self.processes if not self.alive(p)]:
                raise PartFailed(
                    f"{dead[0]} ended with code {self.processes[dead[0]].returncode}:\n{self.tail(dead[0])}"
                )
            try:
                answer = httpx2.get(f"{self.url}/readyz", timeout=5.0)
                if answer.status_code == 200:
                    return
                last = f"missing: {', '.join(answer.json()['missing'])}"
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        raise PartFailed(f"not ready after {timeout:.0f} s ({last}); logs are in {self.data / 'logs'}")

    def tail(self, part: str, lines: int = 15) -> str:
        text = (self.data / "logs" / f"{part}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, *parts: str, force: bool = False, timeout: float = 15.0) -> None:
        """Worker first (it gives its lease back), the engine last. `force` is kill -9."""
        for part in reversed(parts or PARTS):
            process = self.processes.pop(part, None)
            if process is None or process.poll() is not None:
                continue
            process.send_signal(signal.SIGKILL if force else signal.SIGTERM)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def watch(self) -> None:
        """Start again what dies, for ever. Raises PartFailed when a part keeps dying."""
        deaths: dict[str, list[float]] = {part: [] for part in PARTS}
        while True:
            time.sleep(0.5)
            for part in [p for p in self.processes if not self.alive(p)]:
                recent = [t for t in deaths[part] if t > time.monotonic() - 60]
                deaths[part] = [*recent, time.monotonic()]
                if len(deaths[part]) > 5:
                    raise PartFailed(f"{part} keeps dying:\n{self.tail(part)}")
                self.start(part)

    def __enter__(self) -> Self:
        if taken(self.config.host, self.port):
            raise PartFailed(f"port {self.port} of {self.config.host} is taken: choose another with --port")
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _die_with_parent() -> None:
    """In the new process: when the starter is killed, the parts must not stay behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
