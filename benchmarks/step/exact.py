"""Whose rounding is it? Gradients of one step in float32 against the same step in float64.

`python -m benchmarks.step.exact --shapes M`: the baseline in float64 is taken for exact; what the baseline, the plain
and the fast path give in float32 is compared to it, and to each other. Twice the memory of the shape.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from benchmarks.step.shapes import SHAPES, Case, build
from benchmarks.step.variants import VARIANTS

COMPARED = ("baseline", "plain", "fast")


def gradients(case: Case) -> dict[str, Tensor]:
    """Of one step, by variant."""
    found = {}
    for variant in VARIANTS:
        if variant.name in COMPARED:
            case.reset()
            variant.run(case, 1, None)
            found[variant.name] = case.gradient()
    return found


def exact(case: Case) -> Tensor:
    """The baseline's with every weight and every sum in float64. The case cannot be used for anything else after it."""
    case.policy.model.double()
    case.reset()
    (baseline,) = (v for v in VARIANTS if v.name == "baseline")
    baseline.run(case, 1, None)
    return case.gradient()


def errors(case: Case) -> dict[str, float]:
    """Norm of the difference over the norm, by what is compared to what."""
    found = gradients(case)
    truth = exact(case)
    relative = {f"{name} to float64": float((g - truth).norm() / truth.norm()) for name, g in found.items()}
    fast = found["fast"]
    return relative | {f"fast to {n}": float((fast - found[n]).norm() / found[n].norm()) for n in ("baseline", "plain")}


def main() -> None:
    flags = argparse.ArgumentParser(description="Gradients of one step in float32 against float64.")
    flags.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["S", "M", "P"])
    for name in flags.parse_args().shapes:
        for what, error in errors(build(SHAPES[name])).items():
            print(f"{name}: {what} {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
