"""CPU time of variants that take turns, and peak memory above what was resident, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step.shapes import Case
from benchmarks.step.variants import VARIANTS, Variant

ROOT = Path(__file__).parents[2]
Json = dict[str, object]


def one_thread() -> None:
    torch.set_num_threads(1)


def cpu_seconds(run: Callable[[], object]) -> float:
    """User and system time of this process; its one thread computes, so waiting for the machine does not count."""
    gc.collect()
    started = time.process_time()
    run()
    return time.process_time() - started


def in_turn(tasks: Mapping[str, Callable[[], object]], repetitions: int) -> Iterator[tuple[str, float]]:
    """(name, CPU seconds) of every task, `repetitions` times over, each round beginning with another task."""
    names = list(tasks)
    for turn in range(repetitions):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            yield name, cpu_seconds(tasks[name])


@dataclass(frozen=True)
class Ratios:
    """How often a variant fits into the baseline's time, pair by pair."""

    seconds: list[float]
    ratios: list[float]

    @classmethod
    def of(cls, baseline: list[float], seconds: list[float]) -> Ratios:
        return cls(seconds, [b / s for b, s in zip(baseline, seconds, strict=True)])

    def summary(self) -> Json:
        return {
            "cpu_seconds": round(statistics.median(self.seconds), 4),
            "ratio": round(statistics.median(self.ratios), 3),
            "ratio_low": round(min(self.ratios), 3),
            "ratio_high": round(max(self.ratios), 3),
        }


def compare(case: Case, steps: int, repetitions: int, variants: Sequence[Variant] = VARIANTS) -> dict[str, Json]:
    """Per variant: median CPU seconds, paired ratios, and the last step's gradient against the baseline's.

    The gradient is that of the same run whose time is shown (the last repetition).
    """
    prepared = {v.name: v.prepare(case) for v in variants}
    gradients: dict[str, Tensor] = {}

    def task(variant: Variant) -> Callable[[], None]:
        def run() -> None:
            case.reset()
            variant.run(case, steps, prepared[variant.name])
            gradients[variant.name] = case.gradient()

        return run

    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    for name, spent in in_turn({v.name: task(v) for v in variants}, repetitions):
        seconds[name].append(spent)
    expected = gradients["baseline"]
    return {
        v.name: Ratios.of(seconds["baseline"], seconds[v.name]).summary()
        | {"gradient_difference": float((gradients[v.name] - expected).norm() / expected.norm())}
        for v in variants
    }


def peak_above(run: Callable[[], object]) -> float:
    """MB by which this process's resident memory peaks over what it was before. Linux only: the kernel's high-water
    mark is reset through /proc, after freed memory has been given back to it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """kB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peak_in_child(*task: str) -> float:
    """`peak_above` of a task of benchmarks.step.memory, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step.memory", *task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - ourselves
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
