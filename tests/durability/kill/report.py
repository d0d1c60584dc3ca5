"""The matrix in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.durability.kill.traps import Plan

SERIOUS = ("lost", "twice", "out_of_order", "digest", "parent", "alias", "broken", "unserved")


@dataclass(frozen=True)
class Run:
    database: str
    plan: Plan
    struck: bool
    """Whether the point came by while the trap was set."""
    seconds: float
    """From sending to all served."""
    faults: Counter[str]
    """What is wrong after it and was not before."""


@dataclass
class Outcome:
    runs: list[Run] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    versions: int = 0


def summary(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    runs = [run for outcome in outcomes for run in outcome.runs]
    faults = sum((o.faults for o in outcomes), Counter[str]())
    struck = [run for run in runs if run.struck]
    serious = {name: faults[name] for name in SERIOUS}
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in struck:
        cells.setdefault((run.plan.point, run.database), []).append(run)
    by_point: dict[str, dict[str, Any]] = {}
    for (point, database), its in sorted(cells.items()):
        by_point.setdefault(point, {})[database] = _cell(its)
    return {
        "good": not any(serious.values()) and len(struck) == len(runs),
        "runs": len(struck), "without_fault": len(runs) - len(struck), "seed": seed, **serious,
        "acknowledged": sum(o.acknowledged for o in outcomes), "versions": sum(o.versions for o in outcomes),
        "seconds_per_run": round(sum(r.seconds for r in runs) / max(1, len(runs)), 1),
        "slowest_seconds": round(max((r.seconds for r in runs), default=0.0), 1),
        "by_database": dict(Counter(run.database for run in struck)),
        "by_point": by_point,
        "rules_broken": [name for name in faults if name.startswith("rule: ")][:10],
    }  # fmt: skip


def _cell(runs: Sequence[Run]) -> dict[str, Any]:
    """One kill point on one database."""
    faults = sum((run.faults for run in runs), Counter[str]())
    struck = Counter(f"{run.plan.action.name} {run.plan.victim}" for run in runs)
    return {"runs": len(runs), **{name: faults[name] for name in SERIOUS[:3]}, "struck": dict(sorted(struck.items()))}
