"""The benchmark of the gateway runs: what it measures is measured elsewhere."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from benchmarks.gateway import before, synthetic_engine
from benchmarks.pairs import SHORT, SPEEDS, Load, Rounds, Speed, compared, figures


@pytest.mark.slow
def test_both_sides_are_asked_and_every_answer_through_the_gateway_is_kept() -> None:
    with synthetic_engine() as url, before(url) as pair:
        found = asyncio.run(compared(pair, 2, 1, 120.0, Load(2, 3, 1), Load(1, 40, 0)))
        with sqlite3.connect(pair.data / "perennial.db") as rows:
            kept = rows.execute("SELECT response_token_ids, logprobs, adapter_id FROM rollouts").fetchall()
    assert found["rounds"] == 1
    assert found["chunks_per_s"] > 0
    mixed, speed = 2 * 2, 2 * (1 + 1) + 2 * (1 + SHORT // 2)
    asked = 2 * (1 + 2) + mixed + SPEEDS * speed
    assert len(kept) == asked, "each client's first request, then those that are measured"
    assert all(ids and values and adapter for ids, values, adapter in kept)


def test_figures_are_medians_of_what_differs_in_a_round() -> None:
    """A round in which the whole machine was slow moves nothing."""
    rounds = Rounds(
        direct_ms=[1.0, 9.0, 1.0],
        captured_ms=[1.5, 10.0, 1.25],
        gateway_ms=[3.0, 11.5, 3.5],
        mixed_ms=[1.75, 7.0, 1.5],
        cpu_us_per_paced_chunk=[50.0, 60.0, 55.0],
        direct=[100.0, 10.0, 100.0],
        gateway=[Speed(50.0, 5.0, 2.0), Speed(5.0, 9.0, 3.0), Speed(40.0, 6.0, 2.5)],
    )
    found = figures(rounds)
    assert found["ttft_overhead_ms_p50"] == 2.5
    assert found["ttft_overhead_ms_range"] == [2.0, 2.5]
    assert found["ttft_engine_capture_ms_p50"] == 0.5
    assert (found["ttft_gateway_ms_p50"], found["ttft_gateway_ms_range"]) == (1.75, [1.5, 7.0])
    assert (found["chunks_per_s"], found["direct_chunks_per_s"]) == (40, 100)
    assert (found["gateway_cpu_us_per_chunk"], found["gateway_cpu_us_per_paced_chunk"]) == (6.0, 55.0)
