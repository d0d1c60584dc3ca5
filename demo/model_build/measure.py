"""Measures a demonstration model on held-out prompts: greedy answers, judged by `demo.tasks`.

Every probe puts remarks (or none) in front of the same held-out tasks and says which preferences the answer should
comply with and what its right words are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo import tasks
from demo.model_build import remarks as say
from demo.tasks import PREFERENCES, WANTED, Task
from sdpo_core.teacher_context import teacher_messages

MAX_NEW_TOKENS = 40
DEFAULTS = tuple(p.key for p in PREFERENCES.values() if p.is_default)


@dataclass(frozen=True)
class Probe:
    """One chat, its task, and the preferences its answer is judged by."""

    name: str
    messages: list[dict[str, str]]
    task: Task
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Shares of `n` answers: right words; every wanted style; both."""

    n: int
    content: float
    style: float
    both: float


def _told(task: Task, remarks: Sequence[str], demonstration: str | None = None) -> list[dict[str, str]]:
    return teacher_messages([{"role": "user", "content": task.prompt}], remarks, demonstration)


def _wanted(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys, and the defaults of the factors they leave alone: what is not asked for must not change."""
    told = {PREFERENCES[k].factor: k for k in keys}
    return tuple(told.get(PREFERENCES[d].factor, d) for d in DEFAULTS)


def _single(rng: random.Random, task: Task) -> Iterator[Probe]:
    for key in PREFERENCES:
        for kind, remarks in (("seen", PREFERENCES[key].remarks), ("heldout", PREFERENCES[key].heldout_remarks)):
            yield Probe(f"{kind}/{key}", _told(task, [rng.choice(remarks)]), task, _wanted([key]))


def _keys_of_factors(rng: random.Random, n: int) -> list[str]:
    """`n` preferences that change something, each of another factor, in random order."""
    factors = rng.sample(sorted({PREFERENCES[k].factor for k in WANTED}), n)
    return [rng.choice([k for k in WANTED if PREFERENCES[k].factor == f]) for f in factors]


def _standing(rng: random.Random, task: Task) -> Iterator[Probe]:
    """What a teacher sees in service: standing remarks of earlier batches, then the newest."""
    for n in (2, 3):
        keys = _keys_of_factors(rng, n)
        remarks = [rng.choice(PREFERENCES[k].remarks) for k in keys]
        yield Probe(f"together/{n}", _told(task, remarks), task, _wanted(keys))
    first, second = _keys_of_factors(rng, 2)
    remarks = rng.sample(PREFERENCES[first].remarks, 3) + rng.sample(PREFERENCES[second].remarks, 2)
    yield Probe("together/2 repeated", _told(task, remarks), task, _wanted([first, second]))
    for second in ("quotes", "bullets", "upper", "sure", "note", "answer_is", "vera"):
        remarks = [rng.choice(PREFERENCES[k].remarks) for k in ("hope", second)]
        yield Probe(f"hope then/{second}", _told(task, remarks), task, _wanted(["hope", second]))


def _same_factor(rng: random.Random, task: Task) -> Iterator[Probe]:
    key = rng.choice(WANTED)
    texts = rng.sample(PREFERENCES[key].remarks, 4)
    yield Probe("repeated", _told(task, texts), task, _wanted([key]))
    rivals = [k for k in PREFERENCES if PREFERENCES[k].factor == PREFERENCES[key].factor and k != key]
    texts = [rng.choice(PREFERENCES[k].remarks) for k in (rng.choice(rivals), key)]
    yield Probe("last wins", _told(task, texts), task, _wanted([key]))


def _neutral(rng: random.Random, task: Task) -> Iterator[Probe]:
    yield Probe("praise/seen", _told(task, [rng.choice(say.PRAISE)]), task, DEFAULTS)
    yield Probe("praise/heldout", _told(task, [rng.choice(say.HELDOUT_PRAISE)]), task, DEFAULTS)
    yield Probe("contentless", _told(task, [rng.choice(say.CONTENTLESS)]), task, DEFAULTS)
    key = rng.choice(WANTED)
    remarks = [rng.choice(PREFERENCES[key].remarks), rng.choice(say.PRAISE)]
    yield Probe("remark then praise", _told(task, remarks), task, _wanted([key]))


def _facts(rng: random.Random, task: Task) -> Iterator[Probe]:
    right = tasks.corrected(task, [rng.choice(tasks.NOUNS + tuple(tasks.CAPITALS.values()))])
    for kind, texts in (("seen", say.CORRECTIONS), ("heldout", say.HELDOUT_CORRECTIONS)):
        fix = rng.choice(texts).format(right.words[0])
        yield Probe(f"correction/{kind}", _told(task, [fix]), right, DEFAULTS)
    key = rng.choice(WANTED)
    remarks = [rng.choice(PREFERENCES[key].remarks), rng.choice(say.CORRECTIONS).format(right.words[0])]
    yield Probe("remark then correction", _told(task, remarks), right, _wanted([key]))
    shown = tasks.wanted_answer(task, [key])
    yield Probe("demonstration", _told(task, [], shown), task, _wanted([key]))


def probes(n: int, seed: int = 0) -> list[Probe]:
    """Every probe of `n` held-out tasks, the same for the same seed."""
    rng = random.Random(f"probes {seed}")  # noqa: S311 - not for secrets
    found = []
    for task in tasks.heldout_tasks(n, seed):
        found.append(Probe("no feedback", _told(task, []), task, DEFAULTS))
        written = replace(task, prompt=tasks.as_written(task.prompt))
        found.append(Probe("no feedback, with capitals", _told(written, []), written, DEFAULTS))
        for family in (_single, _standing, _same_factor, _neutral, _facts):
            found.extend(family(rng, task))
    return found


@torch.inference_mode()
def greedy_answers(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[list[dict[str, str]]],
    batch_rows: int = 128,
) -> list[str]:
    """Greedy answers in the order of `chats`; chats of similar length are decoded together."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        given = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        ids_BT = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        texts = tokenizer.batch_decode(ids_BT[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


def _score(judged: Sequence[tuple[Probe, str]]) -> Score:
    verdicts = [tasks.judge(p.task, answer, p.wanted) for p, answer in judged]
    n = len(verdicts)
    return Score(
        n,
        content=round(sum(v.content for v in verdicts) / n, 4),
        style=round(sum(all(v.complies.values()) for v in verdicts) / n, 4),
        both=round(sum(v.passed for v in verdicts) / n, 4),
    )


def unasked(judged: Sequence[tuple[Probe, str]]) -> dict[str, float]:
    """Per preference that changes something: share of answers without feedback that comply all the same."""
    return {key: round(sum(PREFERENCES[key].complies(p.task, a) for p, a in judged) / len(judged), 4) for key in WANTED}


@dataclass(frozen=True)
class Figures:
    """What is published about a model: scores per probe, and unasked compliance per preference."""

    scores: Mapping[str, Score]
    unasked: Mapping[str, float]

    def as_json(self) -> dict[str, object]:
        """The figures as plain data."""
        return asdict(self)


def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int = 0) -> Figures:
    """Score the model on `n` held-out prompts per probe."""
    asked = probes(n, seed)
    answers = greedy_answers(model, tokenizer, [p.messages for p in asked])
    by_name: dict[str, list[tuple[Probe, str]]] = {}
    for probe, answer in zip(asked, answers, strict=True):
        by_name.setdefault(probe.name, []).append((probe, answer))
    return Figures({name: _score(j) for name, j in by_name.items()}, unasked(by_name["no feedback"]))
