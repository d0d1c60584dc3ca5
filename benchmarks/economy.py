"""What a job of a worker costs: of 1, 4 and 16 adapters, alone or sharing the passes through the frozen base, from the
files of its parent or from memory.

`python -m benchmarks.economy` (`make bench-economy`) writes build/reports/economy.json. Jobs of the demonstration model
as a service gives them: eight answers, eight steps, the teacher's own answers beside them. The ways take turns in one
process on one thread; figures are CPU seconds of the process per job, ratios those of one turn. The weights of every
version are compared between the ways: neither sharing nor warmth may change a bit. A second table has what lies between
a lease and the first step for adapters of three sizes, from files that are read and checked and from memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from api_schemas.training import LoraSettings, TrainingSettings, resolve
from api_schemas.worker import Lease, LeasedItem, ParentVersion
from benchmarks.economy_start import starts
from demo.run import BASE_MODEL, LORA, MODEL_DIR
from demo.tasks import PREFERENCES, training_tasks, wanted_answer
from worker.base_model import BaseModel, load_base
from worker.job import run_job
from worker.messages import Done, Train
from worker.together import shared_ahead
from worker.versions import version_digest
from worker.warm import WarmVersions

REPORT = Path(__file__).parents[1] / "build" / "reports" / "economy.json"
Json = dict[str, Any]
ITEMS = 8
TURNS = {1: 7, 4: 4, 16: 2}
"""By number of adapters."""
WARM_BYTES = 1 << 30


@dataclass
class OneTask:
    train: Train
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass
class Way:
    """One way to do the jobs of some adapters, with files of its own."""

    name: str
    shared: bool
    base: BaseModel
    root: Path
    parents: list[ParentVersion | None]
    cpu_per_job: list[float] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    """Digests, in order."""

    def take(self, turn: int) -> None:
        """The next job of each adapter."""
        leases = [lease(adapter, turn, parent) for adapter, parent in enumerate(self.parents)]
        began = time.process_time()
        tasks = [OneTask(Train(lease=one)) for one in leases]
        ahead = shared_ahead(tasks, self.base, lambda _: None) if self.shared else {}
        done = [self._job(one, ahead.get(one.run_id)) for one in leases]
        self.cpu_per_job.append((time.process_time() - began) / len(leases))
        self.weights += [f.sha256 for d in done for f in d.files if f.name.endswith(".safetensors")]
        self.parents = [ParentVersion(version=turn + 1, uri=d.uri, digest=version_digest(d.files)) for d in done]

    def _job(self, one: Lease, ahead: Any) -> Done:
        return run_job(one, self.base, self.root, report=lambda _: None, should_stop=lambda: False, ahead=ahead)


def lease(adapter: int, turn: int, parent: ParentVersion | None) -> Lease:
    """Remarks of one kind on eight answers of the adapter's own. The rate is so small that no turn is shorter than
    another: the gap to the teacher stays open."""
    rng = random.Random(1000 * turn + adapter)  # noqa: S311 - not for secrets
    tasks = training_tasks(1 + 100 * turn + adapter, ITEMS)
    items = [
        LeasedItem(
            id=f"item-{n}", messages=[{"role": "user", "content": task.prompt}], response=wanted_answer(task),
            prompt_token_ids=None, response_token_ids=None, behaviour_logprobs=None, version=None,
            feedback=rng.choice(PREFERENCES["hope"].remarks), demonstration=None, standing=True,
        )
        for n, task in enumerate(tasks)
    ]  # fmt: skip
    return Lease(
        run_id=f"run_{adapter}_{turn}", token=turn + 1, lease_seconds=30.0, adapter_id=f"adp_{adapter}",
        adapter="helper", base_model=BASE_MODEL, lora=LoraSettings(**LORA), seed=turn,
        training=resolve(TrainingSettings(), TrainingSettings(learning_rate=1e-6)), parent=parent,
        standing_feedback=[], batch_ids=["batch_1"], items=items,
    )  # fmt: skip


def ways_for(base: BaseModel, root: Path, adapters: int) -> list[Way]:
    kinds = (("alone, cold", False, 0), ("alone, warm", False, WARM_BYTES), ("shared, warm", True, WARM_BYTES))
    return [
        Way(name, shared, replace(base, warm=WarmVersions(kept)), root / f"{adapters}-{n}", [None] * adapters)
        for n, (name, shared, kept) in enumerate(kinds)
    ]


def measured(base: BaseModel, root: Path, adapters: int, turns: int) -> Json:
    """Figures of one number of adapters. The first turn makes the parents and warms up; it is not counted."""
    ways = ways_for(base, root, adapters)
    for turn in range(turns + 1):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            way.take(turn)
    counted = {way.name: way.cpu_per_job[1:] for way in ways}
    cold = counted[ways[0].name]
    return {
        "adapters": adapters,
        "turns": turns,
        "cpu_seconds_per_job": {name: statistics.median(each) for name, each in counted.items()},
        "of_alone_cold": {
            name: statistics.median(a / b for a, b in zip(each, cold, strict=True)) for name, each in counted.items()
        },
        "spread_of_alone_cold": {
            name: [min(r), max(r)]
            for name, each in counted.items()
            for r in [[a / b for a, b in zip(each, cold, strict=True)]]
        },
        "same_bits": all(way.weights == ways[0].weights for way in ways),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=list(TURNS))
    parser.add_argument("--turns", type=int, help="of each number of adapters")
    parser.add_argument("--report", type=Path, default=REPORT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    base = load_base(MODEL_DIR, BASE_MODEL, "cpu", "auto")
    with tempfile.TemporaryDirectory() as directory:
        jobs = [measured(base, Path(directory), n, chosen.turns or TURNS.get(n, 3)) for n in chosen.adapters]
        report = {"jobs": jobs, "starts": starts(Path(directory) / "starts")}
    chosen.report.parent.mkdir(parents=True, exist_ok=True)
    chosen.report.write_text(json.dumps(report, indent=2) + "\n")
    show(report, print)
    print(f"Report: {chosen.report}")
    if not all(row["same_bits"] for row in jobs):
        raise SystemExit("the ways give different weights")


def show(report: Json, line: Callable[[str], None]) -> None:
    names = list(report["jobs"][0]["cpu_seconds_per_job"])
    line("CPU seconds per job (share of alone, cold)")
    line("adapters  " + "  ".join(f"{name:>20}" for name in names) + "  same bits")
    for row in report["jobs"]:
        cells = [f"{row['cpu_seconds_per_job'][n]:9.3f} ({row['of_alone_cold'][n]:6.3f})" for n in names]
        line(f"{row['adapters']:8}  " + "  ".join(f"{c:>20}" for c in cells) + f"  {row['same_bits']}")
    line("\nFrom a lease to the first step, milliseconds")
    line("rank  megabytes  from files cpu (wall)  from memory cpu (wall)")
    for row in report["starts"]:
        cold, warm = row["files"], row["memory"]
        line(
            f"{row['rank']:4}  {row['megabytes']:9.1f}  {cold['cpu_ms']:9.1f} ({cold['wall_ms']:7.1f})    "
            f"{warm['cpu_ms']:9.1f} ({warm['wall_ms']:7.1f})"
        )


if __name__ == "__main__":
    main()
