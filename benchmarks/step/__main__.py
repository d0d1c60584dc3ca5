"""`make bench`: the whole comparison on one thread, about fourteen minutes; `--gpu`: an 8B shape on a GPU.

Writes build/reports/bench.json, prints the tables of docs/speed.md, draws docs/speed.svg and docs/audit.svg. CPU
seconds, not wall seconds; the variants take turns and ratios are of pairs, so a machine that others use as well does
little harm.
"""

from __future__ import annotations

import argparse
import os
import time

from benchmarks.step import audit, compiled_layers, gpu, parts, report
from benchmarks.step.measure import Json, Ratios, compare, cpu_seconds, in_turn, one_thread, peak_in_child
from benchmarks.step.shapes import SHAPES, TINY, build
from benchmarks.step.variants import VARIANTS

TOKENS = (128, 256, 512)


def step_rows(shapes: list[str], repetitions: int) -> list[Json]:
    """A row per shape, number of steps and variant. Memory is measured for one step: more steps keep no more."""
    rows: list[Json] = []
    for name in shapes:
        peaks = {v: peak_in_child("step", name, v, "1") for v in ("baseline", "plain", "fast")}
        case = build(SHAPES[name])
        for steps in (1, 4):
            timed = [v for v in VARIANTS if v.measured_at(name, steps)]
            for variant, figures in compare(case, steps, repetitions, timed).items():
                peak = {"peak_mb": peaks[variant]} if steps == 1 and variant in peaks else {}
                rows.append({"shape": name, "steps": steps, "variant": variant, **figures, **peak})
                print(rows[-1], flush=True)
    return rows


def loss_rows(repetitions: int) -> list[Json]:
    """Head and loss alone at a vocabulary of 152k."""
    rows: list[Json] = []
    for tokens in TOKENS:
        tasks = {name: run for name, run in parts.loss_tasks(tokens).items() if name in ("baseline", "fast")}
        cpu_seconds(tasks["fast"])
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for name, spent in in_turn(tasks, repetitions):
            seconds[name].append(spent)
        found = Ratios.of(seconds["baseline"], seconds["fast"]).summary()
        plain = Ratios.of(seconds["baseline"], seconds["baseline"]).summary()
        row: Json = {"tokens": tokens, "baseline_s": plain["cpu_seconds"], "fast_s": found.pop("cpu_seconds"), **found}
        row |= {f"{name}_mb": peak_in_child("loss", name, str(tokens)) for name in tasks}
        rows.append(row)
        print(row, flush=True)
    return rows


def scaling() -> Json:
    """Least CPU seconds by size."""
    vocabulary = parts.vocabulary_scaling()
    return {
        "response tokens, one step (S)": parts.token_scaling(),
        "adapters, one job each (S)": parts.adapter_scaling(),
        "vocabulary: sparse backward through the head, 256 tokens": vocabulary["backward"],
        "vocabulary: loss and gradient, 256 tokens": vocabulary["fast"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="measure an 8B shape on a GPU instead")
    parser.add_argument("--shapes", default="S,M,P", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps-only", action="store_true", help="leave out the loss alone, the scaling and the audit")
    asked = parser.parse_args()
    if asked.gpu:
        gpu.main()
        return
    one_thread()
    started = time.perf_counter()
    compare(build(TINY), 1, 1)  # loads what is loaded lazily
    steps = step_rows(asked.shapes.split(","), asked.repetitions)
    figures: Json = {"steps": steps, "load": os.getloadavg()}
    report.write(figures)  # an hour on a busy machine is not lost with what comes after
    report.plot(steps)
    loss: list[Json] = []
    grown: Json = {}
    if not asked.steps_only:
        loss, grown, audit_rows = loss_rows(asked.repetitions), scaling(), audit.audited()
        audit.plot(audit_rows)
        figures |= {"loss": loss, "scaling": grown, "audit": audit_rows, "compiled layers": compiled_layers.measured()}
        print(figures["compiled layers"])
    report.write({**figures, "wall_seconds": time.perf_counter() - started})
    print("\n\n".join((report.table(steps), report.loss_table(loss), report.scaling_table(grown))))


if __name__ == "__main__":
    main()
