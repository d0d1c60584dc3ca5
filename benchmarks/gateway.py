"""What the gateway costs: time to first token and chunks per second, against the engine asked directly, in one run.

`make check-gateway` (`python -m benchmarks.gateway --vllm start`) prints a table and writes build/reports/gateway.json.
The service runs as in production, with its database and with every token id and log-prob captured and stored; clients
ask for an adapter by name. The engine is synthetic and never the bottleneck; a real vLLM is measured besides.

* Time to first token: streams at a real engine's pace (10 ms between tokens), one request after the other per client.
  By itself; from the engine that is asked for the same as the gateway asks for; through the gateway; and with each
  stream asking the last two by turns, which tells the gateway's part from the engine's.
* Chunks per second: answers as fast as they can be passed on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Load, Pair, Side, compared
from service.local import LocalConfig, LocalStack, free_port
from tests.vllm.server import VllmConfig, VllmServer

ROOT = Path(__file__).parents[1]
MODEL, MODEL_DIR, ADAPTER = "perennial-demo", ROOT / "demo" / "model", "bench"
REPORT = ROOT / "build" / "reports" / "gateway.json"
AIM = {"ttft_overhead_ms_p50": 4.0, "chunks_per_s": 7000}
PACED, FLOOD = Load(3, 60, 10, 30), Load(3, 600, 0)
REAL_PACED, REAL_FLOOD = Load(6, 16, 0, 30), Load(1, 128, 0)
Json = dict[str, Any]


@contextmanager
def synthetic_engine() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.sse_engine", str(port)], cwd=ROOT)  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health")
        yield url
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def real_engine(which: str) -> Iterator[str]:
    """A vLLM at this URL, or one of our own for `start`."""
    if which != "start":
        yield which
        return
    with tempfile.TemporaryDirectory() as logs:
        server = VllmServer(VllmConfig(MODEL_DIR, MODEL, Path(logs) / "log"))
        with cores_apart(server.start):
            try:
                server.wait_healthy()
                yield server.url
            finally:
                server.stop()


@contextmanager
def cores_apart(start: Callable[[], None]) -> Iterator[None]:
    """What `start` starts has one core for itself, and everything else the others: a model that computes on a GPU does
    not compete with the gateway for cores, and one that spins on all of them makes every switch between processes wait
    for the scheduler."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        start()
        yield
        return
    os.sched_setaffinity(0, cores[:1])
    start()
    os.sched_setaffinity(0, cores[1:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def before(engine: str) -> Iterator[Pair]:
    """`perennial serve` in front of that engine, with an adapter that has learnt nothing yet."""
    with tempfile.TemporaryDirectory() as data:
        stack = LocalStack(LocalConfig(Path(data), MODEL_DIR, MODEL, port=0, settings={"PERENNIAL_ENGINE_URL": engine}))
        stack.start("service")
        try:
            wait_for(f"{stack.url}/healthz")
            headers = {"authorization": f"Bearer {stack.api_key}"}
            httpx2.post(f"{stack.url}/v1/adapters", json={"name": ADAPTER}, headers=headers).raise_for_status()
            gateway = Side(stack.url, stack.api_key, ADAPTER)
            yield Pair(Side(engine, "none", MODEL), gateway, stack.processes["service"].pid, stack.data)
        finally:
            stack.stop()


def wait_for(url: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if httpx2.get(url, timeout=2.0).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer")


def measured(engine: str, options: argparse.Namespace, paced: Load, flood: Load) -> Json:
    """Each figure, by number of streams."""
    with before(engine) as pair:
        by_count = {
            n: asyncio.run(compared(pair, n, options.rounds, options.seconds, paced, flood)) for n in options.streams
        }
    return {name: {str(n): by_count[n][name] for n in by_count} for name in next(iter(by_count.values()))}


def table(title: str, figures: Json) -> Table:
    shown = Table(title=title)
    shown.add_column("")
    for streams in figures["rounds"]:
        shown.add_column(f"{streams} streams", justify="right")
    for name, by_count in figures.items():
        shown.add_row(name, *(str(v) for v in by_count.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of the gateway against the engine asked directly.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=20.0, help="no round is begun after so long, per table column")
    parser.add_argument("--vllm", metavar="URL|start", help="a vLLM that serves the demonstration model, or our own")
    options = parser.parse_args()
    with synthetic_engine() as url:
        report = measured(url, options, PACED, FLOOD)
    out = Console()
    out.print(table("synthetic engine", report))
    if options.vllm:
        with real_engine(options.vllm) as url:
            report["vllm"] = measured(url, options, REAL_PACED, REAL_FLOOD)
        out.print(table("vLLM", report["vllm"]))
    # With more work than cores every process waits: the load says what the figures are worth.
    report |= {"aim": AIM, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    out.print(f"aim: {AIM}; {report['cpus']} cores, load {report['load']:.2f}; written to {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
