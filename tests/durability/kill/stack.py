"""The real stack with two workers, every part a process, and an observer on the wires between them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from demo.run import BASE_MODEL, MODEL_DIR
from service.local import LocalConfig, LocalStack, free_port
from service.settings import Settings
from tests.durability.kill.wire import Gate, Proxy

WORKERS = ("worker-a", "worker-b")
PARTS = ("engine", "service", *WORKERS)
LEASE_SECONDS = 2.0


class FaultyStack(LocalStack):
    """Workers reach the service, and the service the engine, through proxies."""

    def __init__(self, data: Path, database_url: str | None) -> None:
        self.worker_gate_port, self.engine_gate_port = free_port(), free_port()
        self._database_url = database_url
        settings = {
            "PERENNIAL_ENGINE_URL": f"http://127.0.0.1:{self.engine_gate_port}",
            "PERENNIAL_LEASE_SECONDS": str(LEASE_SECONDS),
            "PERENNIAL_PUBLISHER_LEASE_SECONDS": str(LEASE_SECONDS),
            "PERENNIAL_RETRY_BACKOFF": "0.2",
            "PERENNIAL_MAX_ATTEMPTS": "100",  # a job may be hit often; dead letters are another check
            "PERENNIAL_DRAIN_SECONDS": "1",
            "PERENNIAL_RECONCILE_SECONDS": "0.5",
        }
        if database_url is not None:
            settings["PERENNIAL_DATABASE_URL"] = database_url
        super().__init__(LocalConfig(data, MODEL_DIR, BASE_MODEL, port=0, threads=1, device="cpu", settings=settings))

    def _settings(self) -> Settings:
        return Settings.model_validate({"data_dir": self.data, "database_url": self._database_url})

    @property
    def database_url(self) -> str:
        return self._settings().db_url

    def _commands(self) -> dict[str, list[str]]:
        commands = super()._commands()
        command = commands.pop("worker")
        command[command.index("--service-url") + 1] = f"http://127.0.0.1:{self.worker_gate_port}"
        for name in WORKERS:
            commands[name] = [name if word == "local" else word for word in command]
        return commands

    def send(self, part: str, number: signal.Signals) -> None:
        """A signal to a part, or to the training process of a worker (`trainer of worker-a`)."""
        worker = part.removeprefix("trainer of ")
        pid = self.processes[worker].pid
        for target in trainers(pid) if worker != part else [pid]:
            with suppress(ProcessLookupError):
                os.kill(target, number)

    def revive(self) -> None:
        """Start again whatever has died."""
        for part in PARTS:
            if not self.alive(part):
                self.start(part)

    def stop(self, *parts: str, force: bool = False, timeout: float = 15.0) -> None:
        super().stop(*(parts or PARTS), force=force, timeout=timeout)

    def start(self, *parts: str) -> None:
        super().start(*(parts or PARTS))


def trainers(worker: int) -> list[int]:
    """Pids of a worker's children."""
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]
    return []


@contextmanager
def running(data: Path, database_url: str | None, worker_gate: Gate, engine_gate: Gate) -> Iterator[FaultyStack]:
    stack = FaultyStack(data, database_url)
    with ExitStack() as parts:
        parts.enter_context(Proxy(stack.worker_gate_port, stack.url, worker_gate))
        parts.enter_context(Proxy(stack.engine_gate_port, f"http://127.0.0.1:{stack.engine_port}", engine_gate))
        parts.enter_context(stack)
        yield stack
