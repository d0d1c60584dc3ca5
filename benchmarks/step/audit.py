"""Audit mode over a few steps of a small batch: how far fast and plain are apart, step by step."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.step.measure import ROOT, Json
from benchmarks.step.shapes import TINY, build
from benchmarks.step.variants import FAST

PLOT = ROOT / "docs" / "audit.svg"
SHAPE = TINY.scaled(hidden=128, vocabulary=8_000, prompt=24, response=40)
LIMIT = 1e-5
"""Of the gradient, relative, in float32: issue 6's."""
QUANTITIES = {
    "gradient": "gradient, relative", "loss": "loss", "tokens": "any value of any token",
    "teacher": "teacher's log-probs",
}  # fmt: skip


def audited(steps: int = 8) -> list[Json]:
    """Largest differences of every step, by name; a loss with a sparse head gradient, and one with a dense one."""
    rows: list[Json] = []
    for outside in ("renormalise", "tail"):
        case, options = build(SHAPE), FAST.replace(steps=steps, outside=outside, audit=True, micro_batch_tokens=128)
        for metrics in case.train(options).steps:
            assert metrics.audit is not None
            rows.append({"outside": outside, "step": metrics.step, **vars(metrics.audit)})
    return rows


def plot(rows: list[Json], path: Path = PLOT) -> None:
    """A line per quantity on a logarithmic scale, a panel per kind of loss; dashed, what the gradient may be."""
    kinds = list(dict.fromkeys(str(row["outside"]) for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(8, 3.2), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        mine = [row for row in rows if row["outside"] == kind]
        for name, label in QUANTITIES.items():
            axes.plot([r["step"] for r in mine], [r[name] for r in mine], marker=".", label=label)
        axes.axhline(LIMIT, color="black", linestyle="--", linewidth=0.8)
        axes.set(title=kind, xlabel="step", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("largest difference")
    panels[0][-1].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
