"""The experiment record: its statistics, that it resumes, and that the page is what the results say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning.report import write
from benchmarks.learning.run import Run, grid, read, run_missing
from benchmarks.learning.settings import SETTINGS
from benchmarks.learning.stats import estimate, exact, items_to, paired

DOCS = Path(__file__).parents[2] / "docs"


def test_an_interval_holds_its_mean_and_widens_with_the_spread_between_preferences() -> None:
    alike = estimate({(p, s): 0.1 * s for p in "abcd" for s in range(4)})
    apart = estimate({(p, s): 1.0 * i + 0.1 * s for i, p in enumerate("abcd") for s in range(4)})
    assert alike.n == 16
    assert alike.mean == pytest.approx(0.15)
    assert alike.low < alike.mean < alike.high
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert estimate({("a", 0): 0.5}).of_zero == "no difference seen"
    assert math.isnan(estimate({}).mean)


@pytest.mark.parametrize("spreads", [(1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_cover_what_they_say(spreads: tuple[float, float, float]) -> None:
    """Four preferences by four seeds, each with an effect of its own, and noise; the true mean is 0."""
    rng = np.random.default_rng(0)
    of_preference, of_seed, noise = spreads
    hits, draws = 0, 1000
    for _ in range(draws):
        x = (
            of_preference * rng.normal(size=(4, 1))
            + of_seed * rng.normal(size=(1, 4))
            + noise * rng.normal(size=(4, 4))
        )
        found = estimate({("abcd"[p], s): float(x[p, s]) for p in range(4) for s in range(4)})
        hits += found.low <= 0.0 <= found.high
    assert hits / draws >= 0.94


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(4, 4, 0.398, 1.0), (14, 16, 0.617, 0.984), (0, 149, 0.0, 0.0245)]
)
def test_exact_intervals_of_shares(successes: int, n: int, low: float, high: float) -> None:
    """Against published tables."""
    assert exact(successes, n) == pytest.approx((low, high), abs=1e-3)


def test_what_an_interval_allows_to_say() -> None:
    assert estimate({(p, s): 0.1 for p in "ab" for s in range(4)}).of_zero == "more"
    assert estimate({(p, s): -0.1 for p in "ab" for s in range(4)}).of_zero == "less"
    assert estimate({(p, s): 0.1 * (-1) ** s for p in "ab" for s in range(4)}).of_zero == "no difference seen"


def test_pairs_are_of_the_same_unit_or_of_the_nth_seeds() -> None:
    assert paired({("a", 0): 1.0, ("a", 1): 2.0}, {("a", 1): 0.5}) == {("a", 1): 1.5}
    assert paired({("a", 7): 1.0, ("a", 4): 2.0}, {("a", 0): 0.5, ("a", 1): 0.25}) == {("a", 0): 1.5, ("a", 1): 0.75}


def test_items_to_a_share_means_for_good() -> None:
    assert items_to(0.9, [(1, 0.0), (2, 0.95), (4, 0.9)]) == 2
    assert items_to(0.9, [(1, 0.95), (2, 0.8), (4, 0.9)]) == 4
    assert items_to(0.9, [(1, 0.95), (2, 0.8)]) == math.inf


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    file, done = tmp_path / "results.jsonl", []
    runs = [Run("single", "centre", key, 0, lambda _, key=key: done.append(key) or {"key": key}) for key in "ab"]
    assert run_missing(file, runs[:1], say=lambda _: None) == 1
    assert run_missing(file, runs, say=lambda _: None) == 1
    assert done == ["a", "b"]
    assert [r["key"] for r in read(file)] == ["a", "b"]


def test_every_cell_of_the_grid_has_a_name_of_its_own() -> None:
    names = [tuple(run.name.values()) for run in grid()]
    assert len(names) == len(set(names))
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    assert {run.setting for run in grid(["K"]) if run.plan != "in prompt"} == {
        s.name for s in SETTINGS if s.group == "K"
    }


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    """No figure of a table was written by hand, and no run was taken out of the file afterwards."""
    records = read(DOCS / "experiments" / "results.jsonl")
    write(records, tmp_path / "experiments.md")
    assert (tmp_path / "experiments.md").read_text() == (DOCS / "experiments.md").read_text()
    units = [tuple(r[k] for k in ("plan", "setting", "unit", "seed")) for r in records]
    assert len(units) == len(set(units))
    assert json.dumps(records).count("NaN") == 0
