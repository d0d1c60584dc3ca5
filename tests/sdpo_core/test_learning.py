"""Learning on the demonstration model: the acceptance tests of the algorithm, each with its control.

Held-out prompts, greedy answers, no feedback in the context. Thresholds leave room below what docs/algorithm.md and
docs/experiments.md say; the harness is that of the experiments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.learning.person import DEFAULTS, Learner, Method, load, wordings
from benchmarks.learning.plans import STUDIED, Demo, Record, in_prompt, order, sequence, single
from benchmarks.learning.scores import Scores, score
from benchmarks.learning.settings import CENTRE
from demo import tasks
from demo.model_build import remarks as say
from sdpo_core import Options

pytestmark = pytest.mark.slow

HELDOUT = 100
GUIDED = replace(CENTRE, rollouts="teacher")
"""Answers that the teacher wrote: what holds through a sequence (docs/experiments.md)."""
Make = Callable[..., Learner]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(*load())


@functools.cache
def untrained(demo: Demo, key: str, told: int) -> Record:
    """The bare model with so many remarks in its prompt: the same for every test."""
    return in_prompt(demo, key, 0, told)


@pytest.fixture
def learner(demo: Demo) -> Iterator[Make]:
    made: list[Learner] = []

    def make(options: Options = DEFAULTS, **changes: Any) -> Learner:
        made.append(demo.learner(Method(options=options, **changes), 0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def scores(taught: Learner, keys: list[str]) -> Scores:
    return score(taught, keys, HELDOUT)


def praise(taught: Learner, batches: int) -> None:
    taught.hear(lambda: taught.rng.choice(say.PRAISE), [8] * batches)


@pytest.mark.parametrize("told", [1, 4])
@pytest.mark.parametrize("key", STUDIED)
def test_teacher_is_qualified(demo: Demo, key: str, told: int) -> None:
    """E0: told a wish, the teacher obeys it and answers right; untold it does not. Else nothing below means anything.

    Four remarks: a wording that stands and another on the answer must not confuse it.
    """
    untold, obeying = untrained(demo, key, 0), untrained(demo, key, told)
    assert untold["complies"][key] <= 0.02
    assert obeying["complies"][key] >= 0.95
    assert obeying["content"] >= 0.95


@pytest.mark.parametrize("key", STUDIED)
def test_a_preference_is_learnt_within_32_remarks(demo: Demo, key: str) -> None:
    """Against the oracle, the same wish in the prompt; and against the rival, all 32 remarks in the prompt."""
    oracle, memory = untrained(demo, key, 1), untrained(demo, key, 32)
    taught = single(demo, CENTRE, key, 0, "true")["curve"][-1]
    assert taught["items"] == 32
    assert taught["complies"][key] >= 0.95 * oracle["complies"][key]
    assert taught["content"] >= 0.9 * oracle["content"]
    assert taught["content"] * taught["complies"][key] > memory["content"] * memory["complies"][key]


@pytest.mark.parametrize("key", [key for key in STUDIED if key != "upper"])
def test_somebody_elses_feedback_brings_no_gain(demo: Demo, key: str) -> None:
    """The control for the test above: as many remarks and updates, but about other wishes of the same kind.

    Not for capitals: the only other wish of that kind is what the model does anyway, so nothing would be taught.
    """
    record = single(demo, CENTRE, key, 0, "shuffled")
    assert record["updates"] >= 20
    assert max(point["complies"][key] for point in record["curve"]) <= 0.05


def test_contentless_feedback_changes_nothing(demo: Demo) -> None:
    """Not a little: no update at all, so the adapter is the base to the bit."""
    record = single(demo, CENTRE, "hope", 0, "contentless")
    last = record["curve"][-1]
    assert record["updates"] == 0
    assert last["base_kl"] == 0.0
    assert (last["default_style"], last["content"]) == (1.0, 1.0)
    assert record["stands"] == 0


def test_praise_changes_nothing(learner: Make) -> None:
    taught = learner()
    before = scores(taught, [])
    praise(taught, batches=8)
    after = scores(taught, [])
    assert after.base_kl < 0.1
    assert after.default_style >= before.default_style - 0.03
    assert after.content >= before.content - 0.03
    assert taught.standing == ()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_three_preferences_in_a_row_then_the_second_withdrawn(demo: Demo, seed: int) -> None:
    """Each seed in another order, so that each preference is taught first once and last once."""
    keys = order(seed)
    record = sequence(demo, GUIDED, keys, seed, traced=False)
    base = untrained(demo, keys[0], 0)["content"]
    end, withdrawn = record["matrix"][-1], record["withdrawn"]
    assert min(end["complies"].values()) >= 0.9
    assert end["content"] >= 0.85 * base
    assert [sum(r in wordings(key) for r in record["standing"]) for key in keys] == [1, 1, 1]
    assert withdrawn[-1]["complies"][keys[1]] < 0.1
    assert min(withdrawn[-1]["complies"][k] for k in (keys[0], keys[2])) >= 0.9
    assert min(point["content"] for point in withdrawn) >= 0.8 * base, "no version after it is a bad one"
    assert withdrawn[-1]["content"] >= 0.85 * base


def test_without_standing_feedback_the_first_preference_is_lost(learner: Make) -> None:
    """The control for the test above: a teacher told only the newest remark."""
    taught = learner(standing="none")
    taught.prefer("hope", batches=6)
    assert scores(taught, ["hope"]).complies["hope"] >= 0.9
    taught.prefer("upper", batches=6)
    after = scores(taught, ["hope", "upper"])
    assert after.complies["upper"] >= 0.9
    assert after.complies["hope"] < 0.2


def test_three_paraphrases_leave_about_one_remark(learner: Make) -> None:
    taught = learner()
    taught.prefer("hope", batches=1, different=3)
    assert 1 <= len(taught.standing) <= 2
    first = set(taught.standing)
    taught.prefer("upper", batches=1, different=3)
    assert any(r in wordings("hope") for r in taught.standing)
    assert first & set(taught.standing)


def test_contradictory_feedback_does_not_collapse_the_model(learner: Make) -> None:
    taught = learner()
    before = scores(taught, [])
    for round_ in range(4):
        questions = tasks.training_tasks(round_, 8)
        wishes = [wordings(key)[i] for i in range(4) for key in ("upper", "lower")]
        taught.learn(questions, wishes)
    after = scores(taught, [])
    assert after.content >= 0.85 * before.content
    assert after.length == pytest.approx(before.length, rel=0.25)


def test_newest_wish_of_a_kind_wins(learner: Make) -> None:
    taught = learner()
    taught.prefer("hope", batches=5)
    taught.prefer("sparkle", batches=6)
    after = scores(taught, ["hope", "sparkle"])
    assert after.complies["sparkle"] >= 0.9
    assert after.complies["hope"] < 0.1
    assert not any(r in wordings("hope") for r in taught.standing)


@pytest.mark.parametrize(
    ("key", "ratio", "learnt", "content"), [("hope", 2.0, 0.9, 0.9), ("hope", None, 0.9, 0.9), ("vera", 2.0, 0.5, 0.4)]
)
def test_feedback_three_versions_late_still_teaches(
    demo: Demo, key: str, ratio: float | None, learnt: float, content: float
) -> None:
    """With and without the importance ratio, on the preference that being late costs least and on the one that it costs
    most: there it is learnt, not fully, and words are lost (docs/experiments.md has all of them)."""
    method = replace(CENTRE, late=3, options=CENTRE.options.replace(is_clip=ratio))
    record = single(demo, method, key, 0, "true")
    last = record["curve"][-1]
    assert last["complies"][key] >= learnt
    assert last["content"] >= content
    assert record["max_ratio"] > 1.5, "the text is really another version's: on time it is 1"
