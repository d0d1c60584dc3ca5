"""The four ways to train on one batch that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.step.baseline import baseline_batch
from benchmarks.step.shapes import OPTIONS, Case, Targets
from sdpo_core import teacher_targets
from sdpo_core.options import Options


@dataclass(frozen=True)
class Variant:
    """`prepare` is done before the clock starts; `run` trains a number of steps and leaves the last gradient."""

    name: str
    run: Callable[[Case, int, Targets], None]
    prepare: Callable[[Case], Targets] = lambda _: None

    def measured_at(self, shape: str, steps: int) -> bool:
        """Whether `make bench` runs it: more steps of `plain`, and of a precomputed teacher where nothing is asked of
        it, would take minutes and tell nothing new."""
        return steps == 1 or self.name in ("baseline", "fast") or (self.name == "teacher ahead" and shape == "P")


def _baseline(case: Case, steps: int, _: Targets) -> None:
    baseline_batch(case.policy.model, case.samples, OPTIONS, steps)


def _library(options: Options) -> Callable[[Case, int, Targets], None]:
    def run(case: Case, steps: int, targets: Targets) -> None:
        chosen = options.replace(steps=steps)
        result = case.train(chosen, targets)
        assert {m.path for m in result.steps} == {options.path}
        assert result.updates == steps

    return run


def _targets(case: Case) -> Targets:
    return teacher_targets(case.policy, case.samples, FAST)


PLAIN, FAST = OPTIONS.replace(path="plain"), OPTIONS.replace(path="fast")
VARIANTS = (
    Variant("baseline", _baseline),
    Variant("plain", _library(PLAIN)),
    Variant("fast", _library(FAST)),
    Variant("teacher ahead", _library(FAST), _targets),
)
