"""Learning on the demonstration model: the acceptance tests of the algorithm, each with its control.

Held-out prompts, greedy answers, no feedback in the context. Thresholds leave room below what docs/algorithm.md says.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdpo_core import teacher_messages

pytestmark = pytest.mark.slow

HELDOUT = 100


def _load_harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sdpo_learning", Path(__file__).with_name("learning.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


harness = _load_harness()


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    model, tokenizer = harness.load()
    return model, tokenizer


@pytest.fixture
def learner(demo: tuple[Any, Any]) -> Iterator[Callable[..., Any]]:
    made = []

    def make(**settings: Any) -> Any:
        made.append(harness.Learner(*demo, settings.pop("options", harness.DEFAULTS), **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_teacher_is_qualified(demo: tuple[Any, Any], learner: Callable[..., Any]) -> None:
    """E0: told a wish, the teacher obeys it and still answers right. Without this nothing below means anything."""
    rng = random.Random(0)  # noqa: S311
    taught = learner()
    for key in ("hope", "upper"):
        questions = harness.tasks.heldout_tasks(40)
        wishes = [rng.choice(harness.wordings(key)) for _ in questions]
        chats = [
            teacher_messages([{"role": "user", "content": q.prompt}], [w])
            for q, w in zip(questions, wishes, strict=True)
        ]
        texts = [a.text for a in taught.answer_chats(chats, greedy=True)]
        pairs = list(zip(questions, texts, strict=True))
        assert sum(harness.PREFERENCES[key].complies(q, t) for q, t in pairs) >= 0.9 * len(pairs)
        assert sum(harness.tasks.content_right(q, t) for q, t in pairs) >= 0.9 * len(pairs)


def test_a_preference_moves_into_the_adapter(learner: Callable[..., Any]) -> None:
    taught = learner()
    before = taught.scores(["hope"], HELDOUT)
    taught.prefer("hope", batches=8)
    after = taught.scores(["hope"], HELDOUT)
    assert before.complies["hope"] <= 0.02
    assert after.complies["hope"] >= 0.95
    assert after.content >= 0.9 * before.content
    assert taught.seconds < 60


def test_praise_changes_nothing(learner: Callable[..., Any]) -> None:
    taught = learner()
    before = taught.scores([], HELDOUT)
    taught.praise(batches=8)
    after = taught.scores([], HELDOUT)
    assert after.base_kl < 0.1
    assert after.default_style >= before.default_style - 0.03
    assert after.content >= before.content - 0.03
    assert taught.standing == ()


def test_standing_feedback_keeps_the_first_preference(learner: Callable[..., Any]) -> None:
    taught = learner()
    before = taught.scores([], HELDOUT)
    taught.prefer("hope", batches=6)
    assert 1 <= len(taught.standing) <= 3
    taught.prefer("upper", batches=6)
    after = taught.scores(["hope", "upper"], HELDOUT)
    assert after.complies["hope"] >= 0.9
    assert after.complies["upper"] >= 0.9
    assert after.content >= 0.85 * before.content
    wishes = [sum(r in harness.wordings(key) for r in taught.standing) for key in ("hope", "upper")]
    assert all(1 <= n <= 3 for n in wishes)


def test_without_standing_feedback_the_first_preference_is_lost(learner: Callable[..., Any]) -> None:
    """The control for the test above: the same lessons, a teacher told only the newest remark."""
    taught = learner(standing=False)
    taught.prefer("hope", batches=6)
    assert taught.scores(["hope"], HELDOUT).complies["hope"] >= 0.9
    taught.prefer("upper", batches=6)
    after = taught.scores(["hope", "upper"], HELDOUT)
    assert after.complies["upper"] >= 0.9
    assert after.complies["hope"] < 0.2


def test_three_paraphrases_leave_about_one_remark(learner: Callable[..., Any]) -> None:
    taught = learner()
    taught.prefer("hope", batches=1, different=3)
    assert 1 <= len(taught.standing) <= 2
    first = set(taught.standing)
    taught.prefer("upper", batches=1, different=3)
    assert any(r in harness.wordings("hope") for r in taught.standing)
    assert first & set(taught.standing)


def test_contradictory_feedback_does_not_collapse_the_model(learner: Callable[..., Any]) -> None:
    taught = learner()
    before = taught.scores([], HELDOUT)
    for round_ in range(4):
        questions = harness.tasks.training_tasks(round_, 8)
        wishes = [harness.wordings(key)[i] for i in range(4) for key in ("upper", "lower")]
        taught.learn(questions, wishes)
    after = taught.scores([], HELDOUT)
    assert after.content >= 0.85 * before.content
    assert after.length == pytest.approx(before.length, rel=0.25)


def test_newest_wish_of_a_kind_wins(learner: Callable[..., Any]) -> None:
    taught = learner()
    taught.prefer("hope", batches=5)
    taught.prefer("sparkle", batches=6)
    after = taught.scores(["hope", "sparkle"], HELDOUT)
    assert after.complies["sparkle"] >= 0.9
    assert after.complies["hope"] < 0.1
    assert not any(r in harness.wordings("hope") for r in taught.standing)


def test_a_withdrawn_preference_is_unlearnt_and_the_other_stays(learner: Callable[..., Any]) -> None:
    taught = learner()
    before = taught.scores([], HELDOUT)
    taught.prefer("hope", batches=6)
    taught.prefer("upper", batches=6)
    (wish,) = [r for r in taught.standing if r in harness.wordings("hope")]
    taught.undo(wish, batches=6)
    after = taught.scores(["hope", "upper"], HELDOUT)
    assert after.complies["hope"] < 0.1
    assert after.complies["upper"] >= 0.9
    assert after.content >= 0.85 * before.content
