"""What one run does: a unit (preferences and a seed) under one setting, as a record of plain values.

Every run draws its own adapter, questions and wordings from its seed alone; the scoring prompts are the same for all
and in no training set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.learning.person import Learner, Method, asked, wordings
from benchmarks.learning.scores import judged, panel, score
from demo.model_build import remarks as say
from demo.tasks import PREFERENCES

STUDIED = ("hope", "upper", "bullets", "vera")
"""One preference of each style factor."""
CURVE = (1, 1, 2, 4, 8, 16)
"""Batches of a single lesson: 1, 2, 4, 8, 16, 32 remarks in all."""
LESSON, UNLEARNING = 10, 4
"""Batches of 8 per preference of a sequence, and after the withdrawal."""
RIVALS = {"hope": "sparkle", "upper": "lower", "bullets": "quotes", "vera": "sure"}
"""What a person changes his mind to: another wish of the same kind; "lower" is what the model does untold."""
CURVE_PROMPTS, END_PROMPTS = 48, 96
Record = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """What every run starts from."""

    model: Any
    tokenizer: Any

    def learner(self, method: Method, seed: int) -> Learner:
        return Learner(self.model, self.tokenizer, method, seed)


def order(rotation: int) -> tuple[str, ...]:
    """Three of the studied preferences in a row."""
    turned = STUDIED[rotation:] + STUDIED[:rotation]
    return turned[:3]


def scored(learner: Learner, keys: Sequence[str], n: int) -> Record:
    found = asdict(score(learner, keys, n))
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()} | {
        "complies": {k: round(v, 4) for k, v in found["complies"].items()}
    }


def single(demo: Demo, method: Method, key: str, seed: int, feedback: str) -> Record:
    """One preference from a fresh adapter: the learning curve to 32 remarks.

    `feedback`: "true" or a control, `says`.
    """
    learner = demo.learner(method, seed)
    try:
        return {"curve": _lesson(learner, key, [key], feedback)} | summary(learner)
    finally:
        learner.close()


def _lesson(learner: Learner, key: str, scored_keys: Sequence[str], feedback: str = "true") -> list[Record]:
    """32 remarks on one preference, scored after each batch."""
    curve, items, late = [], 0, learner.method.late
    draw = says(learner, key, feedback)
    for n, size in enumerate([*CURVE, *[1] * late]):
        learner.hear(draw, [size])
        if n < late:
            continue  # answers that wait for their feedback
        items += CURVE[n - late]
        last = items == sum(CURVE)
        curve.append({"items": items} | scored(learner, scored_keys, END_PROMPTS if last else CURVE_PROMPTS))
    return curve


def flip(demo: Demo, method: Method, key: str, seed: int) -> Record:
    """A preference for 32 remarks, then its rival for 32; and the rival from a fresh adapter, to compare with."""
    rival = RIVALS[key]
    alone = single(demo, method, rival, seed, "true")["curve"]
    learner = demo.learner(method, seed)
    try:
        before = _lesson(learner, key, [key])
        after = _lesson(learner, rival, [rival, key])
        stood = [sum(r in wordings(k) for r in learner.standing) for k in (key, rival)]
        return {"rival": rival, "alone": alone, "before": before, "after": after, "stood": stood} | summary(learner)
    finally:
        learner.close()


def says(learner: Learner, key: str, feedback: str) -> Callable[[], str]:
    """What the person says of an answer.

    true: the wish. contentless: "ok", "i see". shuffled: what another person said of another answer; the people want
    different things of the same kind (each value of the style factor, the default too) and nobody gets back his own.
    """
    if feedback == "contentless":
        return lambda: learner.rng.choice(say.CONTENTLESS)
    if feedback == "shuffled":
        others = [p.key for p in PREFERENCES.values() if p.factor == PREFERENCES[key].factor and p.key != key]
        return lambda: learner.rng.choice(wordings(learner.rng.choice(others)))
    texts = wordings(key)
    return lambda: learner.rng.choice(texts)


def sequence(demo: Demo, method: Method, keys: Sequence[str], seed: int, *, traced: bool = True) -> Record:
    """Three preferences in a row, all scored after each lesson and, `traced`, after every second batch; then the second
    is withdrawn. Scoring draws nothing: what is learnt is the same without it."""
    learner = demo.learner(method, seed)
    try:
        trace, matrix = [], []
        for key in keys:
            for _ in range(LESSON // 2):
                learner.prefer(key, 2)
                if traced:
                    trace.append(scored(learner, keys, CURVE_PROMPTS))
            matrix.append(scored(learner, keys, END_PROMPTS))
        stood = list(learner.standing)
        return {
            "keys": list(keys), "trace": trace, "matrix": matrix, "standing": stood,
            "withdrawn": withdrawn(learner, keys),
        } | summary(learner)  # fmt: skip
    finally:
        learner.close()


def withdrawn(learner: Learner, keys: Sequence[str]) -> list[Record]:
    """Scores after each batch once every standing remark asking for the second preference is taken back."""
    mine = [r for r in learner.standing if r in wordings(keys[1])]
    if not mine:
        return []
    for remark in mine:
        learner.withdraw(remark)
    found = []
    for _ in range(UNLEARNING):
        learner.unlearn(1)
        found.append(scored(learner, keys, END_PROMPTS))
    return found


def summary(learner: Learner) -> Record:
    """What the learner's batches say of themselves."""
    steps = [s for result in learner.results for s in result.steps]
    return {
        "updates": sum(r.updates for r in learner.results),
        "max_ratio": round(max((s.max_ratio for s in steps), default=1.0), 3),
        "clipped": round(max((s.clip_fraction for s in steps), default=0.0), 4),
        "gap": round(steps[-1].gap, 4) if steps else None,
        "stands": len(learner.standing),
    }


def in_prompt(demo: Demo, key: str, seed: int, told: int) -> Record:
    """The bare model with `told` remarks in its prompt and no training: 0 is the base, 1 the oracle, more a memory."""
    learner = demo.learner(Method(), seed)
    try:
        questions, texts = panel(END_PROMPTS), wordings(key)
        remarks = [[learner.rng.choice(texts) for _ in range(told)] for _ in questions]
        answers = learner.told([asked(q.prompt) for q in questions], remarks)
        found = asdict(judged(questions, answers, [key]))
        return {"told": told, "content": found["content"], "complies": found["complies"]}
    finally:
        learner.close()


def oracle(demo: Demo, keys: Sequence[str], standing: Sequence[str]) -> Record:
    """The bare model told what stood at the end of a sequence: what that sequence's adapter has to match."""
    learner = demo.learner(Method(), 0)
    try:
        questions = panel(END_PROMPTS)
        answers = learner.told([asked(q.prompt) for q in questions], [standing] * len(questions))
        found = asdict(judged(questions, answers, keys))
        return {"standing": list(standing), "content": found["content"], "complies": found["complies"]}
    finally:
        learner.close()


def timed(run: Callable[[], Record]) -> Record:
    """The record with the CPU seconds it took."""
    started = time.process_time()
    found = run()
    return found | {"cpu_seconds": round(time.process_time() - started, 1)}
