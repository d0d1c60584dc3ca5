"""Intervals over units. A unit is a preference and a seed; held-out prompts are not units."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Unit = tuple[str, int]
"""Preference (or order of preferences) and seed."""
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over units and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def of_zero(self) -> str:
        """What the interval of a difference allows to say."""
        return "more" if self.low > 0 else "less" if self.high < 0 else "no difference seen"


def estimate(values: Mapping[Unit, float]) -> Estimate:
    """Hierarchical: preferences are drawn with replacement, then seeds within each. Deterministic.

    Shape legend: G preferences, R resamples.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for (preference, _), value in sorted(values.items()):
        groups[preference].append(value)
    if not groups:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(0)
    means_GR = np.stack([rng.choice(g, (RESAMPLES, len(g))).mean(axis=1) for g in groups.values()])
    chosen_RG = rng.integers(len(means_GR), size=(RESAMPLES, len(means_GR)))
    drawn = means_GR[chosen_RG, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(statistics.fmean(values.values()), float(low), float(high), len(values))


def paired(values: Mapping[Unit, float], reference: Mapping[Unit, float]) -> dict[Unit, float]:
    """Difference per unit that both have; where they share no seed (A/A), the n-th seeds of a preference are a pair."""
    if not set(values) & set(reference):
        values, reference = _numbered(values), _numbered(reference)
    return {unit: values[unit] - reference[unit] for unit in values if unit in reference}


def _numbered(values: Mapping[Unit, float]) -> dict[Unit, float]:
    """With the places of the seeds in their order instead of the seeds."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for preference, seed in sorted(values):
        seeds[preference].append(seed)
    return {(preference, seeds[preference].index(seed)): value for (preference, seed), value in values.items()}


def items_to(share: float, curve: Sequence[tuple[int, float]]) -> float:
    """Remarks after which the curve is at `share` and stays there; inf if it does not."""
    reached = math.inf
    for items, value in reversed(curve):
        if value < share:
            break
        reached = items
    return reached
