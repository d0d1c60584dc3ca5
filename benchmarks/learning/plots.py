"""The plots of docs/experiments.md: small SVG files, the same bytes for the same results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.learning.plans import LESSON, Record
from benchmarks.learning.stats import estimate, paired
from benchmarks.learning.tables import ITEMS, sequences, singles

STYLE: Any = {
    "svg.hashsalt": "perennial", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.3, "lines.linewidth": 1.2,
}  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def curves(records: Sequence[Record], groups: dict[str, list[str]], path: Path) -> None:
    """Learning curves, a panel per group, the centre in each."""
    shown = {group: names for group, names in groups.items() if any(singles(records, n) for n in names)}
    if not shown:
        return
    with mpl.rc_context(STYLE):
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(2.6 * columns, 2.1 * rows), layout="constrained")
        for n, (group, names) in enumerate(shown.items()):
            axes = figure.add_subplot(rows, columns, n + 1)
            for name in ["centre", *names]:
                if runs := singles(records, name):
                    means = [statistics.fmean(dict(r.curve)[i] for r in runs.values()) for i in ITEMS]
                    axes.plot(ITEMS, means, marker=".", label=name, color="black" if name == "centre" else None)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ITEMS, [str(i) for i in ITEMS])
            axes.set(title=group, ylim=(-0.03, 1.03), xlabel="remarks")
            axes.legend(fontsize=6, frameon=False)
        save(figure, path)


def differences(records: Sequence[Record], settings: Sequence[str], path: Path) -> None:
    """Paired differences to the centre with their intervals: the learning curve, and content at the end."""
    reference = singles(records, "centre")
    names = [n for n in settings if n != "centre" and singles(records, n)]
    if not names:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.19 * len(names) + 0.8), layout="constrained")
        for column, (title, what) in enumerate((("learning curve", "speed"), ("content at the end", "content"))):
            axes = figure.add_subplot(1, 2, column + 1)
            for row, name in enumerate(reversed(names)):
                runs = singles(records, name)
                pairs = paired(
                    {u: getattr(r, what) for u, r in runs.items()}, {u: getattr(r, what) for u, r in reference.items()}
                )
                e = estimate(pairs)
                axes.plot([e.low, e.high], [row, row], color="tab:blue")
                axes.plot([e.mean], [row], ".", color="black")
            axes.axvline(0, color="grey", linewidth=0.6)
            axes.set_yticks(range(len(names)), list(reversed(names)) if column == 0 else [""] * len(names))
            axes.set(title=f"{title}, less the centre's")
        save(figure, path)


def traces(records: Sequence[Record], settings: Sequence[str], path: Path) -> None:
    """Sequences over time: compliance with each preference in turn and content, means over the runs."""
    shown = [s for s in settings if sequences(records, s)]
    if not shown:
        return
    with mpl.rc_context(STYLE):
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(2.6 * columns, 1.9 * rows), layout="constrained")
        for n, name in enumerate(shown):
            axes = figure.add_subplot(rows, columns, n + 1)
            runs = [r for r in records if r["plan"] == "sequence" and r["setting"] == name]
            steps = [2 * (i + 1) for i in range(len(runs[0]["trace"]))]
            for place, label in enumerate(("first", "second", "third")):
                values = [
                    _mean(runs, lambda p, r, at=place: p["complies"][r["keys"][at]], i) for i in range(len(steps))
                ]
                axes.plot(steps, values, label=label)
            axes.plot(
                steps, [_mean(runs, lambda p, _: p["content"], i) for i in range(len(steps))], "k--", label="content"
            )
            for lesson in (1, 2):
                axes.axvline(lesson * LESSON, color="grey", linewidth=0.5)
            axes.set(title=name, ylim=(-0.03, 1.03), xlabel="batches of 8")
            if n == 0:
                axes.legend(fontsize=6, frameon=False)
        save(figure, path)


def _mean(runs: Sequence[Record], what: Any, at: int) -> float:
    return statistics.fmean(what(r["trace"][at], r) for r in runs)
