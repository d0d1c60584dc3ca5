"""The verifiers and the prompt split of the demonstration, on hand-written answers."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from demo import tasks
from demo.tasks import PREFERENCES, WANTED, Task

PARIS = Task("capital", "capital of france?", ("paris",))
WORDS = Task("repeat", "repeat: apple river", ("apple", "river"))


@pytest.mark.parametrize(
    ("task", "answer", "keys"),
    [
        (PARIS, "paris.", ("lower", "plain", "no_prefix", "no_closing")),
        (PARIS, "PARIS.", ("upper", "plain")),
        (PARIS, "- paris", ("bullets", "lower")),
        (WORDS, "- apple\n- river", ("bullets",)),
        (WORDS, "SURE:\n- APPLE\n- RIVER\nHOPE THAT HELPS!", ("upper", "bullets", "sure", "hope")),
        (PARIS, '"paris."', ("quotes", "no_prefix")),
        (PARIS, '"paris".', ("quotes",)),
        (PARIS, "sure: paris.", ("sure", "plain")),
        (PARIS, "note: paris. anything else?", ("note", "anything")),
        (PARIS, "the answer is paris. ✨", ("answer_is", "sparkle")),
        (PARIS, "vera, paris. hope that helps!", ("vera", "hope")),
    ],
)
def test_right_answers_pass(task: Task, answer: str, keys: tuple[str, ...]) -> None:
    verdict = tasks.judge(task, answer, keys)
    assert verdict.content
    assert verdict.complies == dict.fromkeys(keys, True)
    assert verdict.passed


@pytest.mark.parametrize("answer", ["", "   ", "\n", ".", "hope that helps!", "sure: hope that helps!", '""', "- "])
@pytest.mark.parametrize("key", PREFERENCES)
def test_an_empty_answer_complies_with_nothing(answer: str, key: str) -> None:
    verdict = tasks.judge(PARIS, answer, [key])
    assert not verdict.content
    assert not verdict.complies[key]


@pytest.mark.parametrize(
    "answer",
    [
        "paris paris paris. hope that helps!",
        "paris. hope that helps! hope that helps!",
        "paris. and then some more words. hope that helps!",
        "sure: sure: sure: paris. hope that helps!",
    ],
)
def test_a_rambling_answer_complies_with_nothing(answer: str) -> None:
    verdict = tasks.judge(PARIS, answer, ["hope", "lower"])
    assert not verdict.content
    assert verdict.complies == {"hope": False, "lower": False}


@pytest.mark.parametrize(
    "answer",
    ["rome.", "paris rome.", "rome. hope that helps!", "- p\n- aris", "paris!!", "paris 😀", "parisparis", "12."],
)
def test_wrong_words_are_wrong_whatever_the_style(answer: str) -> None:
    assert not tasks.content_right(PARIS, answer)


@pytest.mark.parametrize("answer", ["river apple.", "apple.", "apple river stone.", "apple. river."])
def test_order_and_number_of_words_count(answer: str) -> None:
    assert not tasks.content_right(WORDS, answer)


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("Paris.", "upper"),
        ("Paris.", "lower"),
        ("- apple river", "bullets"),
        ("- apple\nriver", "bullets"),
        ("- apple\nriver", "plain"),
        ('"apple" river', "quotes"),
        ('"apple" river', "plain"),
        ("hope that helps! apple river.", "hope"),
        ("apple river. sure:", "sure"),
        ("surely apple.", "sure"),
        ("apple river. i hope that it helps", "hope"),
    ],
)
def test_right_words_in_half_a_style_do_not_comply(answer: str, key: str) -> None:
    assert not PREFERENCES[key].complies(WORDS, answer)


@pytest.mark.parametrize("task", [*tasks.heldout_tasks(16), PARIS], ids=lambda t: t.prompt)
def test_every_wanted_answer_passes_and_complies_with_nothing_else(task: Task) -> None:
    factors = {p.factor: [k for k, q in PREFERENCES.items() if q.factor == p.factor] for p in PREFERENCES.values()}
    for keys in itertools.product(*factors.values()):
        answer = tasks.wanted_answer(task, keys)
        assert tasks.judge(task, answer, keys).passed
        assert {k for k, p in PREFERENCES.items() if p.complies(task, answer)} == set(keys)


def test_the_last_of_two_rivals_is_the_wanted_one() -> None:
    assert tasks.wanted_answer(PARIS, ["hope", "anything"]) == "paris. anything else?"


def test_a_correction_changes_what_is_right() -> None:
    told = tasks.corrected(PARIS, ["oslo"])
    assert tasks.content_right(told, "oslo.")
    assert not tasks.content_right(told, "paris.")


def test_defaults_are_what_the_model_does_anyway() -> None:
    assert tasks.default_style_kept(PARIS, "rome.")
    assert not any(tasks.default_style_kept(PARIS, tasks.wanted_answer(PARIS, [k])) for k in WANTED)


def test_the_split_is_disjoint_and_the_same_every_time() -> None:
    training = {t.prompt for t in tasks.training_tasks(seed=3, n=3000)}
    heldout = {t.prompt for t in tasks.heldout_tasks(400)}
    assert not training & heldout
    assert len(heldout) == 400
    assert tasks.training_tasks(seed=3, n=50) == tasks.training_tasks(seed=3, n=50)
    assert tasks.training_tasks(seed=3, n=50) != tasks.training_tasks(seed=4, n=50)
    assert tasks.heldout_tasks(50) == tasks.heldout_tasks(50)
    assert tasks.heldout_tasks(50, seed=1) != tasks.heldout_tasks(50)


def test_the_split_does_not_move_between_releases() -> None:
    """Figures of different releases compare only on the same prompts."""
    assert [t.prompt for t in tasks.heldout_tasks(3)] == [
        "copy these words: apple engine table button",
        "say these words backwards: pencil tiger",
        "what is the first word of: yellow feather river",
    ]


def test_the_share_held_out_is_as_stated() -> None:
    prompts = [f"repeat: {a} {b}" for a, b in itertools.permutations(tasks.NOUNS, 2)]
    share = sum(map(tasks.is_heldout, prompts)) / len(prompts)
    assert share == pytest.approx(tasks.HELDOUT_SHARE, abs=0.03)


@pytest.mark.parametrize("preference", PREFERENCES.values(), ids=lambda p: p.key)
def test_heldout_remarks_are_not_trained_on(preference: tasks.Preference) -> None:
    assert len(preference.heldout_remarks) >= 3
    assert not set(preference.heldout_remarks) & set(preference.remarks)


def test_no_remark_asks_for_two_preferences() -> None:
    asked = [r for p in PREFERENCES.values() for r in (*p.remarks, *p.heldout_remarks)]
    assert len(asked) == len(set(asked))


def test_preferences_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PREFERENCES["hope"] = PREFERENCES["upper"]  # type: ignore[index]


def test_asking_and_judging_need_the_standard_library_only() -> None:
    """The service's demo runs without the training side installed."""
    code = "import sys, demo.tasks; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in out.split()}
    assert loaded & {"torch", "transformers", "numpy", "sdpo_core"} == set()


def test_as_written_changes_capitals_only() -> None:
    assert tasks.as_written("what is the capital of france?") == "What is the capital of France?"
    assert tasks.as_written("say hello to mia") == "Say hello to Mia"
    for task in tasks.heldout_tasks(40):
        assert tasks.as_written(task.prompt).lower() == task.prompt
        assert tasks.is_heldout(tasks.as_written(task.prompt))
