"""What torch.compile of the decoder layers gains and costs: the fast path on P with them compiled and as they are.

`python -m benchmarks.step.compiled_layers`, a minute and a half on one thread."""

from __future__ import annotations

import time

from benchmarks.step.measure import Json, Ratios, in_turn, one_thread
from benchmarks.step.shapes import P, Shape, build
from benchmarks.step.variants import FAST
from sdpo_core.fast import compiled


def measured(shape: Shape = P, repetitions: int = 7) -> Json:
    """CPU seconds of a step, ratio to the layers as they are, wall seconds of the first batch, gradient difference."""
    case, gradients = build(shape), {}
    compiled.forget()

    def run(compile_layers: bool) -> None:
        case.reset()
        case.train(FAST.replace(steps=1, compile_layers=compile_layers))
        gradients[compile_layers] = case.gradient()

    started = time.perf_counter()
    run(True)
    first = time.perf_counter() - started
    seconds: dict[str, list[float]] = {"as they are": [], "compiled": []}
    tasks = {"as they are": lambda: run(False), "compiled": lambda: run(True)}
    for name, spent in in_turn(tasks, repetitions):
        seconds[name].append(spent)
    difference = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    return {
        "shape": shape.name,
        "first_batch_wall_seconds": round(first, 1),
        **Ratios.of(seconds["as they are"], seconds["compiled"]).summary(),
        "gradient_difference": float(difference),
    }


if __name__ == "__main__":
    one_thread()
    print(measured())
