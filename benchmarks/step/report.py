"""The figures as JSON, as the table of docs/speed.md, and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.step.measure import ROOT

Json = dict[str, Any]
REPORT = ROOT / "build" / "reports" / "bench.json"
PLOT = ROOT / "docs" / "speed.svg"
TARGETS = {
    ("S", 1, "fast"): 2.2, ("S", 4, "fast"): 3.0, ("M", 1, "fast"): 2.8, ("M", 4, "fast"): 3.7,
    ("P", 1, "fast"): 1.6, ("P", 4, "fast"): 1.85, ("P", 4, "teacher ahead"): 2.1,
}  # fmt: skip
"""Ratios that issue 6 asks for."""
COLOURS = {"plain": "#8a8f98", "fast": "#1f77b4", "teacher ahead": "#ff7f0e"}


def table(steps: list[Json]) -> str:
    """Markdown: a row per shape, steps and variant."""
    lines = ["| shape | steps | variant | CPU s | times faster (low-high) | asked | peak MB | gradient difference |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in steps:
        asked = TARGETS.get((row["shape"], row["steps"], row["variant"]))
        peak = row.get("peak_mb")
        lines.append(
            f"| {row['shape']} | {row['steps']} | {row['variant']} | {row['cpu_seconds']:.2f} | "
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) | {asked or ''} | "
            f"{'' if peak is None else round(peak)} | {row['gradient_difference']:.1e} |"
        )
    return "\n".join(lines)


def loss_table(rows: list[Json]) -> str:
    lines = ["| tokens | baseline s, MB | fast s, MB | times faster | share of the memory |", "|---|---|---|---|---|"]
    for r in rows:
        cells = (
            str(r["tokens"]),
            f"{r['baseline_s']:.2f}, {r['baseline_mb']:.0f}",
            f"{r['fast_s']:.2f}, {r['fast_mb']:.0f}",
            f"{r['ratio']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f})",
            f"{r['fast_mb'] / r['baseline_mb']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling_table(scaling: Json) -> str:
    """Seconds at each size, and how many times the first size's."""
    lines = ["| what grows | size: CPU s (times the first) |", "|---|---|"]
    for what, by_size in scaling.items():
        first = next(iter(by_size.values()))
        cells = ", ".join(f"{size}: {s:.3f} ({s / first:.2f})" for size, s in by_size.items())
        lines.append(f"| {what} | {cells} |")
    return "\n".join(lines)


def plot(steps: list[Json], path: Path = PLOT) -> None:
    """Bars of the ratios with their spread; a dash where a ratio is asked for."""
    groups = list(dict.fromkeys((row["shape"], row["steps"]) for row in steps))
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for offset, (variant, colour) in enumerate(COLOURS.items()):
        rows = [r for r in steps if r["variant"] == variant]
        at = [groups.index((r["shape"], r["steps"])) + (offset - 1) * 0.27 for r in rows]
        ratios = [r["ratio"] for r in rows]
        spread = [[r["ratio"] - r["ratio_low"] for r in rows], [r["ratio_high"] - r["ratio"] for r in rows]]
        axes.bar(at, ratios, 0.25, color=colour, label=variant, yerr=spread, error_kw={"linewidth": 0.8})
        for x, row in zip(at, rows, strict=True):
            asked = TARGETS.get((row["shape"], row["steps"], variant))
            if asked is not None:
                axes.plot([x - 0.13, x + 0.13], [asked, asked], color="black", linewidth=1.5)
    names = [f"{shape}, {n} step{'s' if n > 1 else ''}" for shape, n in groups]
    axes.set_xticks(range(len(groups)), names)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_ylabel("times faster than the baseline")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(figures: Json, path: Path = REPORT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
