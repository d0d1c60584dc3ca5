"""A real vLLM server on a CPU as a process: start, kill, start again on the same port, measure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from service.local import LocalStack, free_port

ROOT = Path(__file__).parent.parent.parent
PYTHON_VARIABLE = "PERENNIAL_VLLM_PYTHON"


class VllmMissing(Exception):
    """No environment with vLLM; the message says how to get one."""


class VllmFailed(Exception):
    """The server ended or did not become healthy; the message holds the end of its log."""


def vllm_python() -> Path:
    """The interpreter that has vLLM. Raises VllmMissing."""
    python = Path(os.environ.get(PYTHON_VARIABLE) or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.exists():
        raise VllmMissing(f"{python} is not there: run `make vllm-env` (or name another in {PYTHON_VARIABLE})")
    return python


@dataclass(frozen=True)
class VllmConfig:
    model: Path
    served_name: str
    log: Path
    """Appended to by every start."""
    max_loras: int = 4
    """Distinct adapters in one batch."""
    max_cpu_loras: int = 16
    """Size of the LRU in memory."""
    max_lora_rank: int = 16
    max_model_len: int = 1024
    kv_cache_gib: int = 1
    """Whole GiB: vLLM reads an integer."""
    flags: Sequence[str] = ()
    """Further command line options, last."""


class VllmServer:
    """One server on a port of its own. Also a context manager."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self) -> list[str]:
        c = self.config
        return [
            str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(c.model),
            "--served-model-name", c.served_name, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(c.max_model_len), "--enable-lora",
            "--max-loras", str(c.max_loras), "--max-cpu-loras", str(c.max_cpu_loras), "--enable-prefix-caching",
            "--max-lora-rank", str(c.max_lora_rank), "--api-server-count", "1",
            *c.flags,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        outer = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
        return {
            **outer,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_TARGET_DEVICE": "cpu",
            # By itself vLLM binds its worker, imports and all, to the first core, and a second server's too:
            # beside one that computes it takes minutes to come up. One thread each, where there is room.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # The worker within the engine's process, as on one GPU. On a CPU vLLM gives it one of its own for the sake
            # of the binding that is off here; that imports everything for a third time, 7 s of a core at each start.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(self.config.kv_cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def start(self) -> None:
        """Start the process; it takes `wait_healthy` until it answers."""
        with self.config.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self.environment(),
                cwd=self.config.log.parent,  # not the repository: its packages are not vLLM's
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one process group with its engine and workers, to be ended as one
            )

    def wait_healthy(self, timeout: float = 420.0) -> None:
        """Until `/health` is 200. Raises VllmFailed."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self._process is None or self._process.poll() is not None:
                raise VllmFailed(f"vLLM ended before it was healthy:\n{self.tail()}")
            try:
                if httpx2.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.25)
        raise VllmFailed(f"vLLM was not healthy after {timeout:.0f} s:\n{self.tail()}")

    def stop(self, *, force: bool = False, timeout: float = 30.0) -> None:
        """End the server and everything it started. `force` is kill -9 at once."""
        process, self._process = self._process, None
        if process is None:
            return
        if not force:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, led by it: see start_new_session
        process.wait()

    def pids(self) -> list[int]:
        """The server's own process and its descendants that run now."""
        return [] if self._process is None else _group(self._process.pid)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The engine stands still, and its API server goes on: what happens meanwhile takes no token's time."""
        assert self._process is not None
        engine = [pid for pid in self.pids() if pid != self._process.pid]
        try:
            for pid in engine:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in engine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def log_from(self, mark: int) -> str:
        """What it has logged behind the first `mark` bytes."""
        return self.config.log.read_bytes()[mark:].decode(errors="replace")

    def logged(self) -> int:
        """Bytes so far: a mark for `log_from`."""
        return self.config.log.stat().st_size

    def resident_bytes(self) -> int:
        """Resident memory of all its processes; pages that they share count once per process."""
        return sum(resident(pid) for pid in self.pids())

    def models(self) -> dict[str, str]:
        """Served name -> directory."""
        return {m["id"]: m["root"] for m in httpx2.get(f"{self.url}/v1/models", timeout=10.0).json()["data"]}

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=10.0).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.config.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_healthy()
        except BaseException:
            self.stop(force=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _group(leader: int) -> list[int]:
    """Process ids of one process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        group = int(stat.rpartition(")")[2].split()[2])  # state, parent, group, ...
        if group == leader:
            found.append(int(entry.name))
    return found


def resident(pid: int) -> int:
    """Resident bytes of one process; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def wait_engine(stack: LocalStack, timeout: float = 60.0) -> None:
    """Until the service says that it has its engine."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        assert stack.alive("service"), stack.tail("service")
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{stack.url}/readyz", timeout=5.0).json()["parts"]["engine"] == "ok":
                return
        time.sleep(0.1)
    raise TimeoutError(stack.tail("service"))
