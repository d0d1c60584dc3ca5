"""A share of `make check-kill`: real processes killed and frozen, on both databases."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from tests.durability.kill.matrix import check
from tests.durability.kill.report import Outcome, Run, summary
from tests.durability.kill.traps import ACTIONS, POINTS, VICTIMS, Plan


@pytest.mark.slow
@pytest.mark.parametrize(("database", "seed"), [("sqlite", 5), ("postgresql", 6)])
def test_whoever_is_killed_each_batch_is_applied_once_and_in_order(database: str, seed: int) -> None:
    report = summary(check(3, seed, [database]), seed)
    assert report["good"], report
    assert (report["runs"], report["by_database"]) == (3, {database: 3})
    assert report["acknowledged"] >= 3


def test_what_a_run_broke_is_told_by_its_point_and_database() -> None:
    plan = Plan(POINTS[0], VICTIMS[0], ACTIONS[0])
    bad = Run("sqlite", plan, struck=True, seconds=1.0, faults=Counter(lost=1))
    good = Run("sqlite", Plan(POINTS[0], VICTIMS[1], signal.SIGSTOP), struck=True, seconds=3.0, faults=Counter())
    found = summary([Outcome(runs=[bad, good], faults=Counter(lost=1))], seed=1)
    assert (found["good"], found["runs"], found["lost"], found["seconds_per_run"]) == (False, 2, 1, 2.0)
    assert found["by_point"] == {
        POINTS[0]: {
            "sqlite": {
                "runs": 2, "lost": 1, "twice": 0, "out_of_order": 0,
                "struck": {"SIGKILL worker": 1, "SIGSTOP trainer": 1},
            }
        }
    }  # fmt: skip
    unseen = Run("sqlite", plan, struck=False, seconds=1.0, faults=Counter())
    assert not summary([Outcome(runs=[good, unseen])], seed=1)["good"]
