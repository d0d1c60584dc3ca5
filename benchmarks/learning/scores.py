"""What is measured: held-out prompts, greedy answers, no feedback in the context."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.learning.person import Learner, asked
from demo import tasks
from demo.tasks import PREFERENCES, Task
from sdpo_core.divergence import log_probs
from sdpo_core.policy import response_logits
from sdpo_core.samples import token_batch


@dataclass(frozen=True)
class Scores:
    """Shares of the prompts, 0 to 1; KL in nats per token; length in tokens."""

    content: float
    """The words are right, in whatever style."""
    complies: dict[str, float]
    """Per preference: in the wanted style, around an answer that is there."""
    default_style: float
    """Written as the base writes when it is told nothing."""
    base_kl: float
    """KL(student || base) on the student's own answers."""
    length: float


@functools.cache
def panel(n: int) -> tuple[Task, ...]:
    """The same held-out prompts always; no training set holds one of them."""
    return tuple(tasks.heldout_tasks(n))


def score(learner: Learner, keys: Sequence[str], n: int) -> Scores:
    """The adapter on `n` held-out prompts."""
    questions = panel(n)
    answers = learner.answer([asked(q.prompt) for q in questions], greedy=True)
    batch = token_batch([a.prompt_ids for a in answers], [a.response_ids for a in answers], learner.policy.device)
    with torch.no_grad():
        student, base = (log_probs(response_logits(learner.policy, batch, adapter=on)) for on in (True, False))
    kl_BT = (student.exp() * (student - base)).sum(-1)
    found = judged(questions, [a.text for a in answers], keys)
    length = statistics.fmean(len(a.response_ids) for a in answers)
    return replace(found, base_kl=float(kl_BT[batch.mask()].mean()), length=length)


def judged(questions: Sequence[Task], texts: Sequence[str], keys: Sequence[str]) -> Scores:
    """Texts against their tasks, of the bare model: at no distance from it; their length is not looked at."""
    pairs = list(zip(questions, texts, strict=True))
    return Scores(
        content=statistics.fmean(tasks.content_right(q, t) for q, t in pairs),
        complies={k: statistics.fmean(PREFERENCES[k].complies(q, t) for q, t in pairs) for k in keys},
        default_style=statistics.fmean(tasks.default_style_kept(q, t) for q, t in pairs),
        base_kl=0.0,
        length=0.0,
    )
