"""What the gateway costs: time to first token and chunks per second, against the engine asked directly, in one run.

`python -m benchmarks.gateway` (`make check-gateway`) writes build/reports/gateway.json. The service runs as in
production, with its database and with every token id and log-prob captured and stored. The engine is synthetic and
never the bottleneck; with `--vllm URL` a real one is measured besides.

* Time to first token: streams at a real engine's pace (10 ms between tokens), one request after the other per client.
* Chunks per second: answers as fast as they can be passed on.

Both variants alternate; figures are medians over the rounds. Capture is on: what was measured is in the database.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.sse_client import Streamed, Streamer
from service.local import LocalConfig, LocalStack, free_port

ROOT = Path(__file__).parents[1]
MODEL = "perennial-demo"
REPORT = ROOT / "build" / "reports" / "gateway.json"
AIM = {"ttft_overhead_ms_p50": 4.0, "chunks_per_s": 7000}
Json = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """How much is asked in one round by each stream."""

    requests: int
    tokens: int
    pause_ms: int


PACED, FLOOD = Load(6, 60, 10), Load(4, 600, 0)
REAL_PACED, REAL_FLOOD = Load(6, 16, 0), Load(2, 64, 0)
"""A real engine on a CPU keeps its own pace."""


def body(load: Load) -> Json:
    asked: Json = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "opposite of hot?"}],
        "stream": True,
        "max_tokens": load.tokens,
        "seed": load.pause_ms,
        "ignore_eos": True,
    }
    return asked


async def round_of(url: str, key: str, streams: int, asked: Json, requests: int) -> tuple[list[Streamed], float]:
    """All answers of `streams` clients at once, and the seconds that it took."""
    clients = [await Streamer.connected(url, key) for _ in range(streams)]

    async def one(client: Streamer, wait: float) -> list[Streamed]:
        await asyncio.sleep(wait)  # clients do not start in step
        return [await client.ask(asked) for _ in range(requests)]

    try:
        await asyncio.gather(*(client.ask(asked | {"max_tokens": 1}) for client in clients))
        started = time.perf_counter()
        spread = asked["seed"] * asked["max_tokens"] / 1000 / streams
        done = await asyncio.gather(*(one(c, i * spread) for i, c in enumerate(clients)))
        return [s for each in done for s in each], time.perf_counter() - started
    finally:
        for client in clients:
            client.close()


@dataclass(frozen=True)
class Pair:
    """The engine, and the service in front of it."""

    direct: str
    gateway: str
    key: str
    pid: int


async def compared(pair: Pair, streams: int, rounds: int, paced: Load, flood: Load) -> Json:
    """The figures for so many streams, direct and through the gateway in turn."""
    first: dict[str, list[float]] = {"direct": [], "gateway": []}
    speed: dict[str, list[float]] = {"direct": [], "gateway": []}
    busy, passed = 0.0, 0
    for _ in range(rounds):
        for name, url in (("direct", pair.direct), ("gateway", pair.gateway)):
            answers, _ = await round_of(url, pair.key, streams, body(paced), paced.requests)
            first[name] += [a.first * 1000 for a in answers]
            before = cpu_seconds(pair.pid)
            answers, seconds = await round_of(url, pair.key, streams, body(flood), flood.requests)
            chunks = sum(a.chunks for a in answers)
            speed[name].append(chunks / seconds)
            if name == "gateway":
                busy, passed = busy + cpu_seconds(pair.pid) - before, passed + chunks
    p50 = {name: statistics.median(values) for name, values in first.items()}
    return {
        "ttft_overhead_ms_p50": round(p50["gateway"] - p50["direct"], 3),
        "ttft_ms_p50": round(p50["gateway"], 3),
        "ttft_ms_p95": round(statistics.quantiles(first["gateway"], n=20)[-1], 3),
        "direct_ttft_ms_p50": round(p50["direct"], 3),
        "chunks_per_s": round(statistics.median(speed["gateway"])),
        "direct_chunks_per_s": round(statistics.median(speed["direct"])),
        "gateway_cpu_us_per_chunk": round(busy / passed * 1e6, 1),
    }


def cpu_seconds(pid: int) -> float:
    """What a process and its threads have computed so far: unlike wall time, hardly a matter of who else is there."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def service(data: Path, engine: str) -> LocalStack:
    """`perennial serve` in front of that engine, answering."""
    settings = {"PERENNIAL_ENGINE_URL": engine}
    stack = LocalStack(LocalConfig(data, ROOT / "demo" / "model", MODEL, port=0, settings=settings))
    stack.start("service")
    wait_for(f"{stack.url}/healthz")
    return stack


def wait_for(url: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if httpx2.get(url, timeout=2.0).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer")


def measured(engine: str, counts: list[int], rounds: int, paced: Load, flood: Load) -> Json:
    """Each figure, by number of streams."""
    with tempfile.TemporaryDirectory() as data:
        stack = service(Path(data), engine)
        try:
            pair = Pair(engine, stack.url, stack.api_key, stack.processes["service"].pid)
            by_count = {n: asyncio.run(compared(pair, n, rounds, paced, flood)) for n in counts}
        finally:
            stack.stop()
    names = next(iter(by_count.values()))
    return {name: {str(n): figures[name] for n, figures in by_count.items()} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of the gateway against the engine asked directly.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm", help="URL of a running vLLM that serves the demonstration model, measured besides")
    options = parser.parse_args()
    port = free_port()
    engine = subprocess.Popen([sys.executable, "-m", "benchmarks.sse_engine", str(port)], cwd=ROOT)  # noqa: S603
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        report = measured(f"http://127.0.0.1:{port}", options.streams, options.rounds, PACED, FLOOD)
    finally:
        engine.terminate()
        engine.wait(10)
    if options.vllm:
        report["vllm"] = measured(options.vllm, options.streams, options.rounds, REAL_PACED, REAL_FLOOD)
    # With more work than cores every process waits: the load says what the figures are worth.
    report |= {"aim": AIM, "rounds": options.rounds, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
