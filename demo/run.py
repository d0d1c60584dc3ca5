"""The demonstration: the real stack as separate processes, taught two preferences through its API.

Behaviour is measured on held-out prompts, greedily, and *without* any feedback in the context: what changes is the
adapter. Nothing is simulated; the only part that is small is the model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.client import Client, Json, Reply
from demo.tasks import PREFERENCES, Preference, Task, heldout_tasks, judge, training_tasks
from service.local import LocalConfig, LocalStack

MODEL_DIR = Path(__file__).parent / "model"
BASE_MODEL = "perennial-demo"
ADAPTER = "helper"
LORA = {"rank": 8, "alpha": 16}
TRAINING = {"learning_rate": 7e-4}
"""The demonstration model is small: it takes a larger rate than the default, which is meant for large ones."""


@dataclass(frozen=True)
class Plan:
    first: str = "hope"
    second: str = "quotes"
    batches: int = 16
    """At most, per preference."""
    batch_size: int = 8
    closed_gap: float = 0.05
    """A preference counts as learnt once two batches in a row begin with a smaller gap to the teacher (nats per token):
    their answers are fresh, so this is seen without a single held-out prompt."""
    heldout: int = 120
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Shares of the held-out prompts, 0 to 1."""

    content: float
    complies: dict[str, float]


@dataclass
class Lesson:
    """What teaching one preference took."""

    items: int = 0
    versions: list[int] = field(default_factory=list)
    training_seconds: float = 0.0
    base_kl: float = 0.0


class Demo:
    def __init__(self, client: Client, plan: Plan, console: Console) -> None:
        self._client = client
        self._plan = plan
        self._console = console
        self._heldout = heldout_tasks(plan.heldout, seed=plan.seed)
        self._rng = random.Random(plan.seed)  # noqa: S311 - not for secrets

    def measure(self, model: str) -> tuple[Score, list[Reply]]:
        """Greedy answers to the held-out prompts, with no feedback in the context; not kept as rollouts."""
        prompts = [t.prompt for t in self._heldout]
        replies = self._client.chat_all(model, prompts, temperature=0.0, store=False)
        return score(self._heldout, [r.text for r in replies], (self._plan.first, self._plan.second)), replies

    def teach(self, key: str, seed: int) -> Lesson:
        """Chat, remark on the answers, wait for the version; again, until two batches in a row had little to learn."""
        lesson, preference, closed = Lesson(), PREFERENCES[key], 0
        tasks = iter(training_tasks(seed, self._plan.batches * self._plan.batch_size))
        while closed < 2 and len(lesson.versions) < self._plan.batches:
            batch = [next(tasks) for _ in range(self._plan.batch_size)]
            replies = self._client.chat_all(ADAPTER, [t.prompt for t in batch], temperature=1.0)
            sent = self._client.send_feedback([self._remark(preference, reply) for reply in replies])
            job = self._client.follow(sent["job_id"], self._show_step(key, len(lesson.versions) + 1))
            self._count(lesson, job, len(batch))
            closed = closed + 1 if job["metrics"][0]["gap"] < self._plan.closed_gap else 0
        return lesson

    def _remark(self, preference: Preference, reply: Reply) -> Json:
        return {"completion_id": reply.id, "feedback": self._rng.choice(preference.remarks)}

    def _count(self, lesson: Lesson, job: Json, items: int) -> None:
        lesson.items += items
        lesson.versions.append(job["version"])
        lesson.training_seconds += sum(step.get("seconds") or 0.0 for step in job["metrics"])
        lesson.base_kl = job["metrics"][-1].get("base_kl") or 0.0

    def _show_step(self, key: str, batch: int) -> Callable[[Json], None]:
        def show(step: Json) -> None:
            parts = [f"{name} {_number(step.get(field))}" for name, field in SHOWN]
            self._console.print(
                f"  {key:8} batch {batch} step {step['step']}  " + "  ".join(parts),
                highlight=False,
                soft_wrap=True,  # one step, one line, also in a file
            )

        return show


SHOWN = (
    ("loss", "loss"),
    ("gap", "gap"),
    ("ratio", "mean_is_ratio"),
    ("KL to base", "base_kl"),
    ("entropy", "entropy"),
    ("grad", "grad_norm"),
)


def _number(value: float | None) -> str:
    return "   -  " if value is None else f"{value:6.3f}"


def score(tasks: Sequence[Task], answers: Sequence[str], keys: Sequence[str]) -> Score:
    """Content and compliance over pairs of task and answer."""
    verdicts = [judge(t, a, keys) for t, a in zip(tasks, answers, strict=True)]
    n = len(verdicts)
    complies = {k: sum(v.complies[k] for v in verdicts) / n for k in keys}
    return Score(sum(v.content for v in verdicts) / n, complies)


def run(plan: Plan, data_dir: Path, console: Console) -> Json:
    """The whole demonstration; returns the report."""
    began = time.monotonic()
    shutil.rmtree(data_dir, ignore_errors=True)
    stack = LocalStack(LocalConfig(data_dir, MODEL_DIR, BASE_MODEL, port=0))
    console.print("Starting service, worker and embedded engine as separate processes ...")
    with stack, Client(stack.url, stack.api_key) as client:
        console.print(f"Up at {stack.url} after {time.monotonic() - began:.1f} s.")
        client.call("POST", "/v1/adapters", json={"name": ADAPTER, "lora": LORA, "training": TRAINING})
        demo = Demo(client, plan, console)
        before, replies_before = demo.measure(ADAPTER)
        console.print(f"\nFirst preference: {PREFERENCES[plan.first].remarks[0]!r}")
        first = demo.teach(plan.first, seed=plan.seed + 1)
        middle, replies_middle = demo.measure(ADAPTER)
        console.print(f"\nSecond preference: {PREFERENCES[plan.second].remarks[0]!r}")
        second = demo.teach(plan.second, seed=plan.seed + 2)
        after, replies_after = demo.measure(ADAPTER)
        seconds = time.monotonic() - began
    samples = [[a.text, b.text, c.text] for a, b, c in zip(replies_before, replies_middle, replies_after, strict=True)]
    show_table(console, plan, (before, middle, after), (first, second), seconds)
    show_samples(console, demo._heldout, samples)
    return report(plan, (before, middle, after), (first, second), seconds)


def report(
    plan: Plan, scores: tuple[Score, Score, Score], lessons: tuple[Lesson, Lesson], total_seconds: float
) -> dict[str, Any]:
    before, middle, after = scores
    first, second = lessons
    return {
        "first_preference": plan.first,
        "second_preference": plan.second,
        "compliance_before": before.complies[plan.first],
        "compliance_after": middle.complies[plan.first],
        "content_before": before.content,
        "content_after": middle.content,
        "first_preference_after_second": after.complies[plan.first],
        "second_preference_before": middle.complies[plan.second],
        "second_preference_after": after.complies[plan.second],
        "content_after_second": after.content,
        "kl_to_base_after": first.base_kl,
        "kl_to_base_after_second": second.base_kl,
        "heldout_prompts": plan.heldout,
        "feedback_items": first.items + second.items,
        "versions": len(first.versions) + len(second.versions),
        "training_seconds": round(first.training_seconds + second.training_seconds, 3),
        "total_seconds": round(total_seconds, 1),
        "seed": plan.seed,
    }


def show_table(
    console: Console,
    plan: Plan,
    scores: tuple[Score, Score, Score],
    lessons: tuple[Lesson, Lesson],
    seconds: float,
) -> None:
    first, second = lessons
    table = Table(title=f"{plan.heldout} held-out prompts, greedy, no feedback in the context")
    for column in ("", "before", f"after '{plan.first}'", f"after '{plan.second}'"):
        table.add_column(column)
    for key in (plan.first, plan.second):
        table.add_row(f"answers in style '{key}'", *(f"{s.complies[key]:.1%}" for s in scores))
    table.add_row("task still answered right", *(f"{s.content:.1%}" for s in scores))
    table.add_row("KL to base (nats per token)", "0", f"{first.base_kl:.2f}", f"{second.base_kl:.2f}")
    table.add_row("served version", "v0", f"v{first.versions[-1]}", f"v{second.versions[-1]}")
    table.add_row("remarks", "0", str(first.items), str(first.items + second.items))
    trained = (first.training_seconds, first.training_seconds + second.training_seconds)
    table.add_row("seconds of training", "0", *(f"{t:.1f}" for t in trained))
    console.print()
    console.print(table)
    console.print(f"{seconds:.0f} seconds in all, start of the stack included.")


def show_samples(console: Console, tasks: Sequence[Task], samples: Sequence[Sequence[str]], n: int = 6) -> None:
    console.print("\nSample answers (before | after the first | after the second preference):")
    for task, answers in list(zip(tasks, samples, strict=True))[:n]:
        console.print(f"  {task.prompt}", style="bold", highlight=False, markup=False)
        for answer in answers:
            console.print(f"      {answer!r}", highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", default=Plan.first, choices=sorted(PREFERENCES))
    parser.add_argument("--second", default=Plan.second, choices=sorted(PREFERENCES))
    parser.add_argument("--batches", type=int, default=Plan.batches)
    parser.add_argument("--heldout", type=int, default=Plan.heldout)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--data-dir", type=Path, default=Path("build/demo-data"))
    parser.add_argument("--report", type=Path, default=Path("build/demo-report.json"))
    chosen = parser.parse_args()
    plan = Plan(chosen.first, chosen.second, chosen.batches, heldout=chosen.heldout, seed=chosen.seed)
    console = Console()
    result = run(plan, chosen.data_dir, console)
    chosen.report.parent.mkdir(parents=True, exist_ok=True)
    chosen.report.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Report: {chosen.report}")


if __name__ == "__main__":
    main()
