"""Intervals over units. A unit is a preference and a seed; held-out prompts are not units."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Unit = tuple[str, int]
"""Preference (or order of preferences) and seed."""
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""97.5 % point of Student's t by degrees of freedom; inf for none: one observation says nothing of the spread."""


@dataclass(frozen=True)
class Estimate:
    """A mean over units and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def of_zero(self) -> str:
        """What the interval of a difference allows to say."""
        return "more" if self.low > 0 else "less" if self.high < 0 else "no difference seen"


def estimate(values: Mapping[Unit, float]) -> Estimate:
    """Student's t on the means per preference, and on the means per seed: the wider of the two.

    Units that share a preference are alike, and so are units that share a seed (its adapter, its questions). Resampling
    four preferences and four seeds covers 84 to 90 % where it says 95; this covers 95 % or more (test_experiments).
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(values.values())
    reach = max(_reach(values, lambda unit: unit[0]), _reach(values, lambda unit: unit[1]))
    return Estimate(mean, mean - reach, mean + reach, len(values))


def _reach(values: Mapping[Unit, float], group: Callable[[Unit], str | int]) -> float:
    """Half the width of the t interval on the groups' means."""
    groups: dict[str | int, list[float]] = defaultdict(list)
    for unit, value in values.items():
        groups[group(unit)].append(value)
    means = [statistics.fmean(g) for g in groups.values()]
    if len(means) < 2:
        return math.inf
    return T95[len(means) - 1] * statistics.stdev(means) / math.sqrt(len(means))


def exact(successes: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a share: at least 95 % at any n, however small."""

    def at_least(k: int, p: float) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))

    low = _crossing(lambda p: at_least(successes, p) - 0.025) if successes else 0.0
    high = _crossing(lambda p: at_least(successes + 1, p) - 0.975) if successes < n else 1.0
    return low, high


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a rising function of a share is 0."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low


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
