"""The grid: every run of every setting, appended to a file of JSON lines as soon as it is finished.

A run is named by its plan, setting, unit and seed; what the file holds is not run again, so the grid may be stopped
and continued at any point.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.person import load
from benchmarks.learning.plans import (
    RIVALS,
    STUDIED,
    Demo,
    Record,
    flip,
    in_prompt,
    oracle,
    order,
    sequence,
    single,
    timed,
)
from benchmarks.learning.settings import SETTINGS, Setting

TOLD = (0, 1, 4, 16, 32)
"""Remarks in the prompt of the untrained model: none, the oracle's one, a memory's many."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    plan: str
    setting: str
    unit: str
    seed: int
    work: Callable[[Demo], Record]

    @property
    def name(self) -> dict[str, Any]:
        return {"plan": self.plan, "setting": self.setting, "unit": self.unit, "seed": self.seed}


def grid(only: Sequence[str] = (), records: Iterable[Record] = ()) -> Iterator[Run]:
    """All runs, in order of value; `only` picks settings by group or name. `records`: what is there already, for the
    oracles of sequences are told what stood in the end."""
    for told in TOLD:
        yield from _prompted(told)
    chosen = [s for s in SETTINGS if not only or {s.name, s.group} & set(only)]
    for setting in chosen:
        if "single" in setting.plans:
            yield from _singles(setting)
        if "sequence" in setting.plans:
            yield from _sequences(setting, (0,))
        if "flip" in setting.plans:
            yield from _flips(setting)
    for setting in chosen:
        if setting.every_order:
            yield from _sequences(setting, (1, 2, 3))
    yield from _oracles(records, [s.name for s in chosen if s.every_order])


def _prompted(told: int) -> Iterator[Run]:
    for key in STUDIED:
        yield Run(
            "in prompt", f"{told} in the prompt", key, 0, functools.partial(in_prompt, key=key, seed=0, told=told)
        )


def _singles(setting: Setting) -> Iterator[Run]:
    for seed in setting.seeds:
        for key in STUDIED:
            work = functools.partial(single, method=setting.method, key=key, seed=seed, feedback=setting.feedback)
            yield Run("single", setting.name, key, seed, work)


def _flips(setting: Setting) -> Iterator[Run]:
    for seed in setting.seeds:
        for key, rival in RIVALS.items():
            work = functools.partial(flip, method=setting.method, key=key, seed=seed)
            yield Run("flip", setting.name, f"{key}>{rival}", seed, work)


def _oracles(records: Iterable[Record], settings: Sequence[str]) -> Iterator[Run]:
    """One beside each sequence of the settings that is in the record."""
    for r in records:
        if r["plan"] == "sequence" and r["setting"] in settings:
            work = functools.partial(oracle, keys=r["keys"], standing=r["standing"])
            yield Run("oracle", r["setting"], r["unit"], r["seed"], work)


def _sequences(setting: Setting, turns: Sequence[int]) -> Iterator[Run]:
    """One run per seed and turn; the orders turn with the seeds, so that every preference is taught first once."""
    for seed in setting.seeds:
        for turn in turns:
            keys = order((seed + turn) % len(STUDIED))
            work = functools.partial(sequence, method=setting.method, keys=keys, seed=seed)
            yield Run("sequence", setting.name, ">".join(keys), seed, work)


def read(path: Path) -> list[Record]:
    """Every finished run in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(path: Path, runs: Iterable[Run], say: Callable[[str], None] = print) -> int:
    """Do the runs that the file does not hold; returns how many were done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = {_key(record) for record in read(path)}
    missing = [run for run in runs if _key(run.name) not in there]
    demo = Demo(*load()) if missing else None
    for run in missing:
        assert demo is not None
        record = run.name | timed(functools.partial(run.work, demo))
        with path.open("a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        say(f"{run.plan}, {run.setting}, {run.unit}, seed {run.seed}: {record['cpu_seconds']} s")
    return len(missing)


def _key(record: Record) -> tuple[Any, ...]:
    return record["plan"], record["setting"], record["unit"], record["seed"]
