"""The same load on the engine itself and through the service, in turn: what lies between is the gateway's.

Other work on the machine slows both sides of a pair alike; so each round gives one difference and one ratio, and the
figures are medians over rounds. The service's own computing time hardly depends on who else computes.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.sse_client import Streamed, Streamer

Json = dict[str, Any]
SHORT = 48
"""Requests of a round by which the computing per request is measured: the kernel counts in hundredths of a second."""


@dataclass(frozen=True)
class Load:
    """How much is asked in one round by each stream."""

    requests: int
    tokens: int
    pause_ms: int
    """Between two tokens, of the synthetic engine; a real one keeps its own pace."""


@dataclass(frozen=True)
class Side:
    url: str
    key: str
    model: str
    extra: Json = field(default_factory=dict)
    """What its requests say besides."""


CAPTURE: Json = {
    "logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}, "cache_salt": "bench",
}  # fmt: skip
"""What the gateway asks of an engine besides what its client asks for: with it, the engine itself answers later."""


@dataclass(frozen=True)
class Pair:
    """The engine, and the service in front of it."""

    direct: Side
    gateway: Side
    pid: int
    """Of the service."""
    data: Path
    """Its data directory."""


@dataclass
class Half:
    """What one side took in one round."""

    first_ms: float
    """Median time to the first token."""
    chunks_per_s: float
    cpu_us_per_chunk: float = 0.0
    """Of the service, at full speed."""
    cpu_us_per_paced_chunk: float = 0.0
    """At a real engine's pace, when every chunk comes alone; its share of the request is in it."""
    cpu_ms_per_request: float = 0.0
    """Of the service, for an answer of two tokens, from the first byte of the request until it is stored."""


@dataclass
class Rounds:
    direct: list[Half] = field(default_factory=list)
    gateway: list[Half] = field(default_factory=list)
    captured_ms: list[float] = field(default_factory=list)
    """Median time to the first token of the engine itself when it is asked for all that the gateway asks for."""


def body(side: Side, load: Load, **changes: Any) -> Json:
    return {
        "model": side.model,
        "messages": [{"role": "user", "content": "opposite of hot?"}],
        "stream": True,
        "max_tokens": load.tokens,
        "seed": load.pause_ms,
        "ignore_eos": True,
        **side.extra,
        **changes,
    }


async def asked(side: Side, streams: int, load: Load) -> tuple[list[Streamed], float]:
    """All answers of `streams` clients at once, and the seconds that it took."""
    clients = [await Streamer.connected(side.url, side.key) for _ in range(streams)]

    async def one(client: Streamer, wait: float) -> list[Streamed]:
        await asyncio.sleep(wait)  # clients do not start in step
        return [await client.ask(body(side, load)) for _ in range(load.requests)]

    try:
        await asyncio.gather(*(client.ask(body(side, load, max_tokens=1)) for client in clients))
        spread = load.pause_ms * load.tokens / 1000 / streams
        started = time.perf_counter()
        done = await asyncio.gather(*(one(c, i * spread) for i, c in enumerate(clients)))
        return [s for each in done for s in each], time.perf_counter() - started
    finally:
        for client in clients:
            client.close()


async def first_token_ms(side: Side, streams: int, load: Load) -> float:
    answers, _ = await asked(side, streams, load)
    return statistics.median(a.first for a in answers) * 1000


async def half(side: Side, pid: int, streams: int, paced: Load, flood: Load) -> Half:
    before = cpu_seconds(pid)
    slow, _ = await asked(side, streams, paced)
    between = cpu_seconds(pid)
    fast, seconds = await asked(side, streams, flood)
    after = cpu_seconds(pid)
    short, _ = await asked(side, streams, Load(max(2, SHORT // streams), 2, 0))
    end = cpu_seconds(pid)
    slow_chunks, fast_chunks = (sum(a.chunks for a in answers) for answers in (slow, fast))
    return Half(
        first_ms=statistics.median(a.first for a in slow) * 1000,
        chunks_per_s=fast_chunks / seconds,
        cpu_us_per_chunk=(after - between) / fast_chunks * 1e6,
        cpu_us_per_paced_chunk=(between - before) / slow_chunks * 1e6,
        cpu_ms_per_request=(end - after) / (len(short) + streams) * 1e3,  # each client warms up with one
    )


async def compared(pair: Pair, streams: int, rounds: int, seconds: float, paced: Load, flood: Load) -> Json:
    """The figures for so many streams. At least one round; none is begun after `seconds`."""
    done, until = Rounds(), time.monotonic() + seconds
    while not done.gateway or (len(done.gateway) < rounds and time.monotonic() < until):
        done.direct.append(await half(pair.direct, pair.pid, streams, paced, flood))
        done.captured_ms.append(await first_token_ms(replace(pair.direct, extra=CAPTURE), streams, paced))
        done.gateway.append(await half(pair.gateway, pair.pid, streams, paced, flood))
    return figures(done)


def figures(done: Rounds) -> Json:
    over = [g.first_ms - d.first_ms for g, d in zip(done.gateway, done.direct, strict=True)]
    captured = [ms - d.first_ms for ms, d in zip(done.captured_ms, done.direct, strict=False)]
    median = statistics.median
    return {
        "ttft_overhead_ms_p50": round(median(over), 3),
        "ttft_overhead_ms_range": [round(min(over), 3), round(max(over), 3)],
        "ttft_engine_capture_ms_p50": round(median(captured), 3) if captured else None,
        "direct_ttft_ms_p50": round(median(h.first_ms for h in done.direct), 3),
        "chunks_per_s": round(median(h.chunks_per_s for h in done.gateway)),
        "direct_chunks_per_s": round(median(h.chunks_per_s for h in done.direct)),
        "gateway_cpu_us_per_chunk": round(median(h.cpu_us_per_chunk for h in done.gateway), 1),
        "gateway_cpu_us_per_paced_chunk": round(median(h.cpu_us_per_paced_chunk for h in done.gateway), 1),
        "gateway_cpu_ms_per_request": round(median(h.cpu_ms_per_request for h in done.gateway), 2),
        "rounds": len(over),
    }


def cpu_seconds(pid: int) -> float:
    """What a process and its threads have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
