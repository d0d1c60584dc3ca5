"""A person who gives feedback to the demonstration model, and the library learning from it, without the service.

Used by test_learning.py and from the shell, for the figures in docs/algorithm.md:

    python tests/sdpo_core/learning.py sequence --preferences hope,upper --seeds 4 --set steps=4 --set alpha=0.5
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import tasks
from demo.model_build import remarks as say
from demo.tasks import PREFERENCES, Task
from sdpo_core import (
    BatchResult,
    LoraSpec,
    Options,
    Probe,
    Sample,
    attach_lora,
    chat_ids,
    detach,
    make_optimizer,
    teacher_prompt,
    train_batch,
    update_standing,
    withdraw,
)
from sdpo_core.divergence import log_probs, token_log_probs
from sdpo_core.policy import response_logits
from sdpo_core.samples import token_batch
from sdpo_core.standing import DEFAULT_EPS

DEFAULTS = Options(learning_rate=1.5e-3)
"""The library's defaults at the rate that suits a model this small."""
MODEL = Path(__file__).parents[2] / "demo" / "model"


def load() -> tuple[Any, Any]:
    """The demonstration model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def wordings(key: str) -> tuple[str, ...]:
    """Remarks asking for a preference, less those the teacher takes for a correction of the answer's words."""
    return tuple(r for r in PREFERENCES[key].remarks if not r.lower().startswith("you should have"))


@dataclass(frozen=True)
class Answer:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Scores:
    """Shares over held-out prompts, answered greedily without feedback; KL(student || base), nats per token."""

    content: float
    complies: dict[str, float]
    default_style: float
    base_kl: float
    length: float


class Learner:
    """An adapter on the demonstration model that is taught by batches of remarks."""

    def __init__(
        self, model: Any, tokenizer: Any, options: Options, *, seed: int = 0, standing: bool = True,
        eps: float = DEFAULT_EPS, rank: int = 8, alpha: int = 16,
    ) -> None:  # fmt: skip
        self.tokenizer, self.options, self.keeps_standing, self.eps = tokenizer, options, standing, eps
        self.policy = attach_lora(model, LoraSpec(rank=rank, alpha=alpha, seed=seed))
        self.optimizer = make_optimizer(self.policy, options)
        self.rng = random.Random(f"person {seed}")  # noqa: S311 - not for secrets
        self.standing: tuple[str, ...] = ()
        self.seconds = 0.0
        self.results: list[BatchResult] = []

    def close(self) -> None:
        detach(self.policy)

    def answer(self, prompts: Sequence[str], *, greedy: bool) -> list[Answer]:
        """Answers to single questions."""
        return self.answer_chats([[{"role": "user", "content": p}] for p in prompts], greedy=greedy)

    @torch.no_grad()
    def answer_chats(self, chats: Sequence[Any], *, greedy: bool) -> list[Answer]:
        """Answers with the adapter on, decoded together; the end-of-turn token is part of the response."""
        ids = [chat_ids(self.tokenizer, chat) for chat in chats]
        longest = max(map(len, ids))
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        out = self.policy.model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(i)) + i for i in ids]),
            attention_mask=torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids]),
            max_new_tokens=40, do_sample=not greedy, eos_token_id=end, pad_token_id=pad,
            **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
        )  # fmt: skip
        rows = out[:, longest:].tolist()
        cut = [row[: row.index(end) + 1] if end in row else row for row in rows]
        texts = self.tokenizer.batch_decode(cut, skip_special_tokens=True)
        return [Answer(tuple(i), tuple(r), t) for i, r, t in zip(ids, cut, texts, strict=True)]

    def learn(self, questions: Sequence[Task], remarks: Sequence[str]) -> BatchResult:
        """One batch: the model answers each question, hears one remark per answer, and learns."""
        torch.manual_seed(self.rng.randrange(1 << 30))
        answers = self.answer([q.prompt for q in questions], greedy=False)
        logps = self._own_logprobs(answers)
        started = time.perf_counter()
        messages = [[{"role": "user", "content": q.prompt}] for q in questions]
        samples = []
        for turn, answer, remark, logp in zip(messages, answers, remarks, logps, strict=True):
            told = teacher_prompt(self.tokenizer, turn, remark, self.standing, limit=900)
            samples.append(Sample(answer.prompt_ids, answer.response_ids, told.ids, tuple(logp), told.taught))
        result = train_batch(self.policy, self.optimizer, samples, self.options)
        if self.keeps_standing:
            probes = [Probe(m, a.response_ids) for m, a in zip(messages, answers, strict=True)]
            self.standing = update_standing(
                self.policy, self.tokenizer, self.standing, remarks, probes, eps=self.eps
            ).remarks
        self.seconds += time.perf_counter() - started
        self.results.append(result)
        return result

    def prefer(self, key: str, batches: int, *, batch: int = 8, different: int | None = None) -> None:
        """Teach one preference: random training questions, random wordings of the wish (`different` ones at most)."""
        texts = wordings(key)
        if different is not None:
            texts = tuple(self.rng.sample(texts, different))
        for _ in range(batches):
            questions = tasks.training_tasks(self.rng.randrange(1 << 30), batch)
            self.learn(questions, [self.rng.choice(texts) for _ in questions])

    def undo(self, remark: str, batches: int, *, batch: int = 8) -> None:
        """Withdraw a standing remark and learn, on fresh answers, from a teacher told only what still stands."""
        self.standing = withdraw(self.standing, remark)
        for _ in range(batches):
            questions = tasks.training_tasks(self.rng.randrange(1 << 30), batch)
            chats = [[{"role": "user", "content": q.prompt}] for q in questions]
            torch.manual_seed(self.rng.randrange(1 << 30))
            samples = []
            for chat, answer in zip(chats, self.answer_chats(chats, greedy=False), strict=True):
                told = teacher_prompt(self.tokenizer, chat, None, self.standing, limit=900, standing_teaches=True)
                samples.append(Sample(answer.prompt_ids, answer.response_ids, told.ids, taught=told.taught))
            self.results.append(train_batch(self.policy, self.optimizer, samples, self.options))

    def praise(self, batches: int, *, batch: int = 8) -> None:
        for _ in range(batches):
            questions = tasks.training_tasks(self.rng.randrange(1 << 30), batch)
            self.learn(questions, [self.rng.choice(say.PRAISE) for _ in questions])

    @torch.no_grad()
    def _own_logprobs(self, answers: Sequence[Answer]) -> list[list[float]]:
        batch = token_batch([a.prompt_ids for a in answers], [a.response_ids for a in answers], self.policy.device)
        logp = log_probs(response_logits(self.policy, batch, adapter=True))
        return [
            token_log_probs(logp[b, : len(a.response_ids)], torch.tensor(a.response_ids)).tolist()
            for b, a in enumerate(answers)
        ]

    @torch.no_grad()
    def scores(self, keys: Sequence[str], n: int = 100) -> Scores:
        questions = tasks.heldout_tasks(n)
        answers = self.answer([q.prompt for q in questions], greedy=True)
        pairs = list(zip(questions, [a.text for a in answers], strict=True))
        batch = token_batch([a.prompt_ids for a in answers], [a.response_ids for a in answers], self.policy.device)
        student, base = (log_probs(response_logits(self.policy, batch, adapter=on)) for on in (True, False))
        kl = (student.exp() * (student - base)).sum(-1)[batch.mask()].mean()
        return Scores(
            content=statistics.fmean(tasks.content_right(q, t) for q, t in pairs),
            complies={k: statistics.fmean(PREFERENCES[k].complies(q, t) for q, t in pairs) for k in keys},
            default_style=statistics.fmean(tasks.default_style_kept(q, t) for q, t in pairs),
            base_kl=float(kl),
            length=statistics.fmean(len(a.response_ids) for a in answers),
        )


def _options(settings: Sequence[str]) -> Options:
    values: dict[str, Any] = {"learning_rate": DEFAULTS.learning_rate}
    for name, _, value in (s.partition("=") for s in settings):
        literal = value[0] in "-0123456789[tfn" and name not in ("support", "outside")
        values[name] = json.loads(value) if literal else value
    return Options.from_dict(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", choices=("sequence", "praise"))
    parser.add_argument("--preferences", default="hope")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--no-standing", action="store_true")
    parser.add_argument("--trace", action="store_true", help="scores after every batch")
    parser.add_argument("--set", action="append", default=[], help="an option, such as steps=4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    keys = args.preferences.split(",")
    for seed in range(args.seeds):
        learner = Learner(model, tokenizer, _options(args.set), seed=seed, standing=not args.no_standing)
        print(f"seed {seed} before", learner.scores(keys, args.heldout))
        for key in [""] if args.plan == "praise" else keys:
            for _ in range(args.batches):
                learner.praise(1) if not key else learner.prefer(key, 1)
                if args.trace:
                    last = learner.results[-1]
                    gaps = " ".join(f"{s.gap:.3f}/{s.peak_gap:.2f}" for s in last.steps)
                    print("   ", last.stop_reason, last.updates, "gaps", gaps, learner.scores(keys, 40))
            updates = sum(r.updates for r in learner.results)
            print(f"seed {seed} after {key or 'praise'}: {learner.scores(keys, args.heldout)} updates={updates} "
                  f"seconds={learner.seconds:.1f} standing={list(learner.standing)}", flush=True)  # fmt: skip
        learner.close()


if __name__ == "__main__":
    main()
