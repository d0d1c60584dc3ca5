"""A learner and the person who talks to it: the library on the demonstration model, without the service.

A person asks random training questions, reads the answers, and remarks on each. The learner keeps what the service
keeps: an adapter, an optimizer, standing remarks. `Method` is everything that may differ between two learners.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import tasks
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
    learnt_from,
    make_ema,
    make_optimizer,
    teacher_messages,
    teacher_prompt,
    train_batch,
    update_standing,
    usable_remarks,
    withdraw,
)
from sdpo_core.divergence import log_probs, token_log_probs
from sdpo_core.policy import response_logits
from sdpo_core.rollouts import Rollouts
from sdpo_core.samples import token_batch

MODEL = Path(__file__).parents[2] / "demo" / "model"
DEFAULTS = Options(learning_rate=1.5e-3, steps=4)
"""What the library's defaults were before the record, for a model this small."""
WINDOW = 900
"""Tokens a prompt may have."""
LONGEST = 40
"""Tokens of an answer; the longest right one has some 30."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Method:
    """How a learner learns."""

    options: Options = DEFAULTS
    rank: int = 8
    scale: float = 2.0
    """LoRA alpha as a multiple of the rank."""
    standing: Literal["judged", "all", "none"] = "judged"
    """Earlier remarks that the teacher goes on being told: those that stand, every one, none."""
    rollouts: Rollouts = "own"
    """Who writes the answers that are learnt from; "both": the student's, and the teacher's beside them."""
    rehearsal: float = 0.0
    """Share of a batch added as earlier questions, answered again by the adapter, with the remark they once got."""
    late: int = 0
    """Versions between an answer and the feedback on it."""


@dataclass(frozen=True)
class Rollout:
    """An answer as the service keeps it."""

    messages: Messages
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()
    """Under the weights that wrote it."""


def load() -> tuple[Any, Any]:
    """The demonstration model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def wordings(key: str) -> tuple[str, ...]:
    """Remarks asking for a preference, less those the teacher takes for a correction of the answer's words."""
    return tuple(r for r in PREFERENCES[key].remarks if not r.lower().startswith("you should have"))


def asked(question: str) -> Messages:
    return [{"role": "user", "content": question}]


@dataclass
class Learner:
    """An adapter on the demonstration model that is taught by batches of remarks. `close` takes it off the model."""

    model: Any
    tokenizer: Any
    method: Method = field(default_factory=Method)
    seed: int = 0

    def __post_init__(self) -> None:
        spec = LoraSpec(rank=self.method.rank, alpha=round(self.method.scale * self.method.rank), seed=self.seed)
        self.policy = attach_lora(self.model, spec)
        self.optimizer = make_optimizer(self.policy, self.method.options)
        self.ema = make_ema(self.policy) if self.method.options.teacher == "ema" else None
        self.rng = random.Random(f"person {self.seed}")  # noqa: S311 - not for secrets
        self.standing: tuple[str, ...] = ()
        self.lessons: list[tuple[Messages, str]] = []
        self.waiting: deque[tuple[list[Rollout], Sequence[str]]] = deque()
        self.results: list[BatchResult] = []

    def close(self) -> None:
        detach(self.policy)

    def answer(self, chats: Sequence[Messages], *, greedy: bool) -> list[Rollout]:
        """Answers of the adapter, decoded together; the end-of-turn token is part of the response."""
        prompts = [chat_ids(self.tokenizer, chat) for chat in chats]
        responses = self._generate(prompts, greedy)
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Rollout(chat, tuple(p), tuple(r), text)
            for chat, p, r, text in zip(chats, prompts, responses, texts, strict=True)
        ]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], greedy: bool) -> list[list[int]]:
        longest = max(map(len, prompts))
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        out = self.policy.model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=LONGEST, do_sample=not greedy, eos_token_id=end, pad_token_id=pad,
            **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
        )  # fmt: skip
        rows = out[:, longest:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def chat(self, chats: Sequence[Messages]) -> list[Rollout]:
        """Sampled answers, with the log-probs of the weights that wrote them."""
        torch.manual_seed(self.rng.randrange(1 << 30))
        found = self.answer(chats, greedy=False)
        batch = token_batch([r.prompt_ids for r in found], [r.response_ids for r in found], self.policy.device)
        with torch.no_grad():
            logp_BTV = log_probs(response_logits(self.policy, batch, adapter=True))
        return [
            Rollout(
                r.messages, r.prompt_ids, r.response_ids, r.text,
                tuple(token_log_probs(logp_BTV[b, : len(r.response_ids)], torch.tensor(r.response_ids)).tolist()),
            )
            for b, r in enumerate(found)
        ]  # fmt: skip

    def learn(self, questions: Sequence[Task], remarks: Sequence[str]) -> BatchResult | None:
        """One batch: the model answers, hears one remark per answer, and learns.

        With `late` versions between the two, answers and remarks wait, and what is learnt now was written that many
        versions ago; nothing (None) until there is such.
        """
        self.waiting.append((self.chat([asked(q.prompt) for q in questions]), remarks))
        if len(self.waiting) <= self.method.late:
            return None
        rollouts, remarks = self.waiting.popleft()
        again = self._rehearsed(len(rollouts))
        samples = [self._sample(r, remark) for r, remark in zip(rollouts, remarks, strict=True)]
        result = self._train(samples + [self._sample(r, remark) for r, remark in again])
        self._remember(rollouts, remarks)
        return result

    def _sample(self, rollout: Rollout, remark: str | None) -> Sample:
        """What is learnt from an answer; without a remark, what stands is taught."""
        told = teacher_prompt(
            self.tokenizer, rollout.messages, remark, self.standing, limit=WINDOW, standing_teaches=remark is None
        )
        return Sample(rollout.prompt_ids, rollout.response_ids, told.ids, rollout.logprobs or None, told.taught)

    def _train(self, samples: list[Sample]) -> BatchResult:
        learnt = learnt_from(self.policy, samples, self.method.rollouts, max_new_tokens=LONGEST)
        result = train_batch(self.policy, self.optimizer, learnt, self.method.options, ema=self.ema)
        self.results.append(result)
        return result

    def _rehearsed(self, batch: int) -> list[tuple[Rollout, str]]:
        """Earlier questions, answered again by the adapter as it is now, with the remark that they once got."""
        n = round(self.method.rehearsal * batch + 0.49) if self.method.rehearsal else 0
        lessons = self.rng.sample(self.lessons, min(n, len(self.lessons)))
        if not lessons:
            return []
        rollouts = self.chat([messages for messages, _ in lessons])
        return [(r, remark) for r, (_, remark) in zip(rollouts, lessons, strict=True)]

    def _remember(self, rollouts: Sequence[Rollout], remarks: Sequence[str]) -> None:
        self.lessons += [(r.messages, remark) for r, remark in zip(rollouts, remarks, strict=True)]
        if self.method.standing == "all":
            self.standing = tuple(usable_remarks([*self.standing, *remarks]))
        if self.method.standing == "judged":
            probes = [Probe(r.messages, r.response_ids) for r in rollouts]
            self.standing = update_standing(self.policy, self.tokenizer, self.standing, remarks, probes).remarks

    def prefer(self, key: str, batches: int, *, batch: int = 8, different: int | None = None) -> None:
        """Teach one preference: random training questions, random wordings of the wish (`different` ones at most)."""
        texts = wordings(key)
        if different is not None:
            texts = tuple(self.rng.sample(texts, different))
        self.hear(lambda: self.rng.choice(texts), [batch] * batches)

    def hear(self, remark: Callable[[], str], batches: Sequence[int]) -> None:
        """Batches of these sizes, a remark drawn for each answer."""
        for size in batches:
            questions = tasks.training_tasks(self.rng.randrange(1 << 30), size)
            self.learn(questions, [remark() for _ in questions])

    def withdraw(self, remark: str) -> None:
        """Take a standing remark back; `unlearn` teaches it."""
        self.standing = withdraw(self.standing, remark)

    def unlearn(self, batches: int, *, batch: int = 8) -> None:
        """Fresh answers, taught by nothing but what still stands."""
        for _ in range(batches):
            questions = tasks.training_tasks(self.rng.randrange(1 << 30), batch)
            self._train([self._sample(r, None) for r in self.chat([asked(q.prompt) for q in questions])])

    def told(self, chats: Sequence[Messages], remarks: Sequence[Sequence[str]]) -> list[str]:
        """Greedy answers of the bare model with these remarks in its context."""
        prompts = [
            chat_ids(self.tokenizer, teacher_messages(chat, list(r))) for chat, r in zip(chats, remarks, strict=True)
        ]
        answers = [list(ids) for ids in self.policy.write(prompts, LONGEST)]
        return list(self.tokenizer.batch_decode(answers, skip_special_tokens=True))
