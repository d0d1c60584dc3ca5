"""Synthetic chats the demonstration model is trained on: a question, perhaps a feedback block, the ideal answer.

The feedback block is written by `sdpo_core.teacher_context.teacher_messages`, so that what the model learns to obey is
exactly what a teacher is shown in service: standing remarks, oldest first, then the newest one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from demo import tasks
from demo.model_build import remarks as say
from demo.tasks import PREFERENCES, Style, Task
from sdpo_core.teacher_context import teacher_messages

FACTORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        factor: tuple(p.key for p in PREFERENCES.values() if p.factor == factor)
        for factor in ("case", "layout", "prefix", "closing")
    }
)
MAX_BULLETS = 6


@dataclass(frozen=True)
class Row:
    """One training chat: the prompt as messages, and the answer (the only part with a loss)."""

    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Mix:
    """How often each kind of row is drawn (weights), and how often a plain row is long copying practice."""

    plain: float
    one: float
    stack: float
    neutral: float
    correction: float
    demonstration: float
    dense: float


EARLY = Mix(plain=0.40, one=0.36, stack=0.12, neutral=0.04, correction=0.06, demonstration=0.02, dense=0.5)
LATE = Mix(plain=0.20, one=0.27, stack=0.36, neutral=0.07, correction=0.06, demonstration=0.04, dense=0.1)


def _pick_value(rng: random.Random, factor: str) -> str:
    """A value of the factor: mostly one that changes something."""
    default = getattr(Style(), factor)
    if rng.random() < 0.12:
        return str(default)
    return rng.choice([k for k in FACTORS[factor] if k != default])


def _remark(rng: random.Random, key: str) -> str:
    return _as_typed(rng, rng.choice(PREFERENCES[key].remarks))


def _as_typed(rng: random.Random, remark: str) -> str:
    """Some people begin with a capital letter and end with a full stop."""
    if rng.random() < 0.2:
        remark = remark[0].upper() + remark[1:]
    if remark[-1].isalnum() and rng.random() < 0.2:
        remark += "."
    return remark


def _merged(rng: random.Random, lists: Sequence[Sequence[str]]) -> list[str]:
    """The lists dealt into one at random, each keeping its own order."""
    left = [list(x) for x in lists if x]
    merged = []
    while left:
        source = rng.choices(left, weights=[len(x) for x in left])[0]
        merged.append(source.pop(0))
        left = [x for x in left if x]
    return merged


def _about_one_factor(rng: random.Random, factor: str, rich: bool) -> tuple[str, list[str]]:
    """(the value that holds in the end, remarks about it): contradicted ones first, perhaps repeated in other words."""
    final = _pick_value(rng, factor)
    texts = [_remark(rng, final)]
    if rich and rng.random() < 0.35:
        texts += [_remark(rng, final) for _ in range(rng.randint(1, 2))]
    if rich and rng.random() < 0.3:
        others = [k for k in FACTORS[factor] if k != final]
        texts = [_remark(rng, rng.choice(others)) for _ in range(rng.choice((1, 1, 2)))] + texts
    return final, texts


def _style_remarks(rng: random.Random, factors: int, rich: bool) -> tuple[Style, list[str]]:
    """A style of `factors` wanted values and a block of remarks that asks for it."""
    style, lists = Style(), []
    for factor in rng.sample(list(FACTORS), factors):
        final, texts = _about_one_factor(rng, factor, rich)
        style = replace(style, **{factor: final})
        lists.append(texts)
    if rich and rng.random() < 0.2:
        lists.append([_as_typed(rng, rng.choice(say.PRAISE + say.CONTENTLESS))])
    block = _merged(rng, lists)
    return (style, block) if len(block) <= MAX_BULLETS else _style_remarks(rng, factors, rich)


def _user(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]


def _in_any_case(rng: random.Random, task: Task) -> Task:
    """Some people write "What is the capital of France?"."""
    return replace(task, prompt=tasks.as_written(task.prompt)) if rng.random() < 0.2 else task


def _dense_task(rng: random.Random) -> Task:
    """Copying practice: many answer tokens per row make the copying circuit appear sooner."""
    while True:
        words = tuple(rng.sample(tasks.NOUNS, rng.randint(5, 9)))
        prompt = rng.choice(tasks.PHRASINGS["repeat"]).format(" ".join(words))
        if not tasks.is_heldout(prompt):
            return Task("repeat", prompt, words)


def _plain(rng: random.Random, task: Task, mix: Mix) -> Row:
    """No feedback: the default style, rarely another one, so that a sampled answer is now and then different."""
    if rng.random() < mix.dense:
        task = _dense_task(rng)
    style = Style()
    if rng.random() < 0.08:
        factor = rng.choice(list(FACTORS))
        style = replace(style, **{factor: _pick_value(rng, factor)})
    return Row(_user(task), tasks.render(task.words, style))


def _one(rng: random.Random, task: Task, mix: Mix) -> Row:  # noqa: ARG001 - one signature for all makers
    style, block = _style_remarks(rng, 1, rich=False)
    return Row(teacher_messages(_user(task), block), tasks.render(task.words, style))


def _stack(rng: random.Random, task: Task, mix: Mix) -> Row:  # noqa: ARG001
    style, block = _style_remarks(rng, rng.choice((1, 1, 2, 2, 2, 2, 3, 3)), rich=True)
    return Row(teacher_messages(_user(task), block), tasks.render(task.words, style))


def _neutral(rng: random.Random, task: Task, mix: Mix) -> Row:  # noqa: ARG001
    """Praise and remarks without content change nothing."""
    texts = rng.sample(say.PRAISE + say.CONTENTLESS, rng.choice((1, 1, 2, 3)))
    block = [_as_typed(rng, t) for t in texts]
    return Row(teacher_messages(_user(task), block), tasks.render(task.words))


def _any_words(rng: random.Random) -> tuple[str, ...]:
    pools = (tasks.NOUNS, tuple(tasks.CAPITALS.values()), tuple(tasks.OPPOSITES), tasks.NUMBERS)
    return tuple(rng.sample(rng.choice(pools), rng.choice((1, 1, 2))))


def _correction(rng: random.Random, task: Task, mix: Mix) -> Row:  # noqa: ARG001
    """The right answer is stated in the block: it is believed, alone or among remarks on style."""
    task = tasks.corrected(task, _any_words(rng))
    style, block = _style_remarks(rng, rng.choice((0, 0, 1, 1, 2)), rich=False)
    stated = " ".join(task.words)
    stated = tasks.as_written(stated) if rng.random() < 0.2 else stated
    fix = _as_typed(rng, rng.choice(say.CORRECTIONS).format(stated))
    block = [*block, fix] if rng.random() < 0.5 else _merged(rng, [block, [fix]])
    return Row(teacher_messages(_user(task), block), tasks.render(task.words, style))


def _demonstration(rng: random.Random, task: Task, mix: Mix) -> Row:  # noqa: ARG001
    """A good answer is shown, alone or with remarks that agree with it."""
    style, block = _style_remarks(rng, rng.choice((0, 1, 1, 2)), rich=False)
    answer = tasks.render(task.words, style)
    told = block if rng.random() < 0.4 else []
    return Row(teacher_messages(_user(task), told, answer), answer)


_MAKERS: Mapping[str, Callable[[random.Random, Task, Mix], Row]] = MappingProxyType(
    {
        "plain": _plain,
        "one": _one,
        "stack": _stack,
        "neutral": _neutral,
        "correction": _correction,
        "demonstration": _demonstration,
    }
)


def _with_history(rng: random.Random, row: Row) -> Row:
    """Sometimes the chat has a system message or an earlier turn, which change nothing."""
    roll = rng.random()
    if roll < 0.03:
        return replace(row, messages=[{"role": "system", "content": "you are a helpful assistant."}, *row.messages])
    if roll < 0.06:
        earlier = tasks.draw_task(rng, heldout=False)
        turn = [*_user(earlier), {"role": "assistant", "content": tasks.render(earlier.words)}]
        return replace(row, messages=[*turn, *row.messages])
    return row


def rows(seed: int, mixes: Callable[[int], Mix]) -> Iterator[Row]:
    """Endless training rows, the same for the same seed; `mixes(i)` is the mix that row i is drawn from."""
    rng = random.Random(f"rows {seed}")  # noqa: S311 - not for secrets
    index = 0
    while True:
        mix = mixes(index)
        kind = rng.choices(list(_MAKERS), weights=[getattr(mix, k) for k in _MAKERS])[0]
        task = _in_any_case(rng, tasks.draw_task(rng, heldout=False))
        yield _with_history(rng, _MAKERS[kind](rng, task, mix))
        index += 1
