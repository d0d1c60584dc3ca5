"""One peak-memory figure as JSON: `python -m benchmarks.step.memory step M fast 1` or `... loss fast 256`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarks.step.measure import one_thread, peak_above
from benchmarks.step.parts import loss_tasks
from benchmarks.step.shapes import SHAPES, TINY, build
from benchmarks.step.variants import VARIANTS


def of_step(shape: str, variant: str, steps: str) -> Callable[[], None]:
    """A whole batch; the tiny shape is run first, so that libraries are loaded."""
    chosen = next(v for v in VARIANTS if v.name == variant)
    warm = build(TINY)
    chosen.run(warm, 1, chosen.prepare(warm))
    case = build(SHAPES[shape])
    prepared = chosen.prepare(case)
    case.reset()
    return lambda: chosen.run(case, int(steps), prepared)


def of_loss(variant: str, tokens: str) -> Callable[[], object]:
    """Head and loss alone, forward and backward."""
    loss_tasks(8, vocabulary=512)[variant]()
    return loss_tasks(int(tokens))[variant]


def main(kind: str, *task: str) -> None:
    one_thread()
    run = of_step(*task) if kind == "step" else of_loss(*task)
    print(json.dumps({"peak_mb": round(peak_above(run), 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
