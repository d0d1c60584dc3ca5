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
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.sse_client import Streamed, Streamer

Json = dict[str, Any]
SHORT = 48
"""Requests of a round by which the computing per request is measured: the kernel counts in hundredths of a second."""
SPEEDS = 3
"""Rounds at full speed, at most: their figures hardly differ."""


@dataclass(frozen=True)
class Load:
    """How much is asked in one round by each stream."""

    requests: int
    tokens: int
    pause_ms: int
    """Between two tokens, of the synthetic engine; a real one keeps its own pace."""
    think_ms: int = 0
    """Clients wait for up to so long, at random, before each request. An engine works in steps and ends answers with
    them: who asks again at once asks at the same point of a step each time, another one through the gateway."""

    async def thought(self, random: Random) -> None:
        await asyncio.sleep(random.uniform(0, self.think_ms) / 1000)


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
class Rounds:
    """One figure per round and side. Times to the first token are medians of a round, in ms."""

    direct_ms: list[float] = field(default_factory=list)
    captured_ms: list[float] = field(default_factory=list)
    """Of the engine itself when it is asked for all that the gateway asks for."""
    gateway_ms: list[float] = field(default_factory=list)
    mixed_ms: list[float] = field(default_factory=list)
    """How much later through the gateway than from the engine that is asked for the same, both under one load."""
    cpu_us_per_paced_chunk: list[float] = field(default_factory=list)
    """Of the service at a real engine's pace, when every chunk comes alone; its share of the request is in it."""
    direct: list[float] = field(default_factory=list)
    """Chunks per second at full speed."""
    gateway: list[Speed] = field(default_factory=list)


@dataclass
class Speed:
    """The service at full speed, in one round."""

    chunks_per_s: float
    cpu_us_per_chunk: float = 0.0
    cpu_ms_per_request: float = 0.0
    """For an answer of two tokens, from the first byte of the request until it is stored."""


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

    async def one(client: Streamer, number: int) -> list[Streamed]:
        random, done = Random(number), list[Streamed]()  # noqa: S311 - no secret
        await asyncio.sleep(number * spread)  # clients do not start in step
        for _ in range(load.requests):
            await load.thought(random)
            done.append(await client.ask(body(side, load)))
        return done

    try:
        await asyncio.gather(*(client.ask(body(side, load, max_tokens=1)) for client in clients))
        spread = load.pause_ms * load.tokens / 1000 / streams
        started = time.perf_counter()
        done = await asyncio.gather(*(one(c, i) for i, c in enumerate(clients)))
        return [s for each in done for s in each], time.perf_counter() - started
    finally:
        for client in clients:
            client.close()


async def first_token_ms(side: Side, streams: int, load: Load) -> tuple[float, int]:
    """Median time to the first token, and how many chunks came in all."""
    answers, _ = await asked(side, streams, load)
    return statistics.median(a.first for a in answers) * 1000, sum(a.chunks for a in answers)


async def mixed_ms(pair: Pair, streams: int, load: Load) -> float:
    """How much later the first token comes through the gateway, where each stream asks one side after the other.

    Whoever is asked, the engine has the same to do for the others meanwhile; and both want log-probs of it, which cost
    all requests of a step alike. What differs is the gateway.
    """
    sides = (pair.gateway, replace(pair.direct, extra=CAPTURE))
    clients = [[await Streamer.connected(side.url, side.key) for side in sides] for _ in range(streams)]
    firsts: tuple[list[float], list[float]] = ([], [])

    async def one(number: int) -> None:
        await asyncio.sleep(load.pause_ms * load.tokens / 1000 * number / streams)
        random = Random(number)  # noqa: S311
        for turn in range(2 * load.requests):
            await load.thought(random)
            which = (number + turn) % 2
            firsts[which].append((await clients[number][which].ask(body(sides[which], load))).first)

    try:
        await asyncio.gather(*(one(i) for i in range(streams)))
    finally:
        for client in chain.from_iterable(clients):
            client.close()
    through, itself = (statistics.median(f) * 1000 for f in firsts)
    return through - itself


async def first_round(done: Rounds, pair: Pair, streams: int, load: Load) -> None:
    """Every side once, another one first each time: what drifts meanwhile is no side's own."""

    async def gateway() -> None:
        before = cpu_seconds(pair.pid)
        ms, chunks = await first_token_ms(pair.gateway, streams, load)
        done.gateway_ms.append(ms)
        done.cpu_us_per_paced_chunk.append((cpu_seconds(pair.pid) - before) / chunks * 1e6)

    async def direct() -> None:
        done.direct_ms.append((await first_token_ms(pair.direct, streams, load))[0])

    async def captured() -> None:
        done.captured_ms.append((await first_token_ms(replace(pair.direct, extra=CAPTURE), streams, load))[0])

    async def mixed() -> None:
        done.mixed_ms.append(await mixed_ms(pair, streams, load))

    parts = (direct, captured, gateway, mixed)
    shift = len(done.direct_ms) % len(parts)
    for part in parts[shift:] + parts[:shift]:
        await part()


async def speed_round(done: Rounds, pair: Pair, streams: int, flood: Load) -> None:
    answers, seconds = await asked(pair.direct, streams, flood)
    done.direct.append(sum(a.chunks for a in answers) / seconds)
    before = cpu_seconds(pair.pid)
    answers, seconds = await asked(pair.gateway, streams, flood)
    between = cpu_seconds(pair.pid)
    short, _ = await asked(pair.gateway, streams, Load(max(2, SHORT // streams), 2, 0))
    end = cpu_seconds(pair.pid)
    chunks = sum(a.chunks for a in answers)
    requests = len(short) + streams  # each client warms up with one
    done.gateway.append(Speed(chunks / seconds, (between - before) / chunks * 1e6, (end - between) / requests * 1e3))


async def compared(pair: Pair, streams: int, rounds: int, seconds: float, paced: Load, flood: Load) -> Json:
    """The figures for so many streams. At least one round of either kind; none is begun after `seconds`, of which
    those of the first token have three quarters."""
    done, start = Rounds(), time.monotonic()
    while not done.gateway_ms or (len(done.gateway_ms) < rounds and time.monotonic() < start + seconds * 0.75):
        await first_round(done, pair, streams, paced)
    while not done.gateway or (len(done.gateway) < SPEEDS and time.monotonic() < start + seconds):
        await speed_round(done, pair, streams, flood)
    return figures(done)


def figures(done: Rounds) -> Json:
    median = statistics.median
    over = [g - d for g, d in zip(done.gateway_ms, done.direct_ms, strict=True)]
    captured = [c - d for c, d in zip(done.captured_ms, done.direct_ms, strict=True)]
    return {
        "ttft_overhead_ms_p50": round(median(over), 3),
        "ttft_overhead_ms_range": [round(min(over), 3), round(max(over), 3)],
        "ttft_engine_capture_ms_p50": round(median(captured), 3),
        "ttft_gateway_ms_p50": round(median(done.mixed_ms), 3),
        "ttft_gateway_ms_range": [round(min(done.mixed_ms), 3), round(max(done.mixed_ms), 3)],
        "direct_ttft_ms_p50": round(median(done.direct_ms), 3),
        "chunks_per_s": round(median(s.chunks_per_s for s in done.gateway)),
        "direct_chunks_per_s": round(median(done.direct)),
        "gateway_cpu_us_per_chunk": round(median(s.cpu_us_per_chunk for s in done.gateway), 1),
        "gateway_cpu_us_per_paced_chunk": round(median(done.cpu_us_per_paced_chunk), 1),
        "gateway_cpu_ms_per_request": round(median(s.cpu_ms_per_request for s in done.gateway), 2),
        "rounds": len(over),
    }


def cpu_seconds(pid: int) -> float:
    """What a process and its threads have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
