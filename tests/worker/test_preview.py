"""A preview by the training process, called directly: on the demonstration model, which acts on remarks about style."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from api_schemas.preview import MAX_PREVIEW_TOKENS, Preview
from demo.run import BASE_MODEL, MODEL_DIR
from sdpo_core.explain import AnswerView, Explanation, TokenView
from worker.base_model import BaseModel, load_base
from worker.errors import TrainingFailedError
from worker.job import run_job, run_preview
from worker.preview import preview_of, token_bytes
from worker.versions import version_digest

Show = Callable[..., Preview]


@pytest.fixture(autouse=True)
def _as_transformers_speaks() -> Any:
    with warnings.catch_warnings():
        # PEFT 0.21 asks Transformers 5.23 for a property under its deprecated name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(MODEL_DIR, BASE_MODEL, "cpu", "auto")


@pytest.fixture
def lease_of(make_lease: Any, make_item: Any) -> Callable[..., Any]:
    """A lease about answers "lima." to one question."""

    def make(*remarks: str, response: str = "lima.", **fields: Any) -> Any:
        chat = [{"role": "user", "content": "capital of peru?"}]
        items = [make_item(n, r, messages=chat, response=response) for n, r in enumerate(remarks)]
        return make_lease(base_model=BASE_MODEL, **fields).model_copy(update={"items": items, "kind": "preview"})

    return make


@pytest.fixture
def show(base: BaseModel, lease_of: Any, tmp_path: Path) -> Show:
    def go(*remarks: str, **fields: Any) -> Preview:
        preview = run_preview(lease_of(*remarks, **fields), base, tmp_path, report=lambda _: None).preview
        assert list(tmp_path.iterdir()) == [], "nothing is written"
        return preview

    return go


def test_what_the_teacher_would_change_is_at_the_tokens_of_the_style(show: Show) -> None:
    capitals, closing = show("in capitals, please", "end with: hope that helps!").items
    by_text = {t.text: t for t in capitals.tokens}
    assert by_text["lima"].instead is not None
    assert by_text["lima"].instead.text == "LIMA"
    assert by_text["lima"].student - by_text["lima"].teacher > 2.0
    assert by_text["."].effect < 0.1, "capitals change no full stop"
    end = closing.tokens[-1]
    assert end.instead is not None
    assert (end.instead.text.strip(), end.student - end.teacher > 2.0) == ("hope", True)
    assert closing.tokens[0].effect < 0.5
    for item in (capitals, closing):
        assert item.acts
        assert item.moved_share == pytest.approx(1 / 3, abs=1e-4)
        gaps = [abs(t.teacher - t.student) for t in item.tokens]
        assert item.largest_gap == pytest.approx(max(gaps), abs=1e-3)
        assert item.mean_gap == pytest.approx(sum(gaps) / 3, abs=1e-3)


def test_a_remark_that_asks_for_nothing_has_nearly_no_effect(show: Show) -> None:
    found = show("ok", "thanks", "in capitals, please")
    assert [i.acts for i in found.items] == [False, False, True]
    assert [i.moved_share for i in found.items[:2]] == [0.0, 0.0]
    assert max(t.effect for i in found.items[:2] for t in i.tokens) < 0.1
    assert found.acting_share == pytest.approx(1 / 3)
    assert found.items[2].expected_drift > 20 * found.items[0].expected_drift


def test_what_stands_already_is_no_effect_of_a_new_remark(show: Show) -> None:
    """Nor is a remark without effect because it stands already."""
    standing = ["in capitals, please"]
    found = show("ok", *standing, standing_feedback=standing)
    assert [i.acts for i in found.items] == [False, True]
    lima = found.items[0].tokens[0]
    assert lima.student - lima.teacher > 2.0, "what stands is still to be learnt"


def test_a_preview_starts_from_the_parent_and_moves_nothing(
    base: BaseModel, lease_of: Any, make_training: Any, tmp_path: Path
) -> None:
    remark = "in capitals, please"
    before = {k: v.clone() for k, v in base.module.state_dict().items()}
    fresh = run_preview(lease_of(remark), base, tmp_path, report=lambda _: None).preview
    lora = lease_of(remark).lora.model_copy(update={"rank": 8, "alpha": 16})
    training = make_training(steps=12, learning_rate=5e-3)
    done = run_job(
        lease_of(remark, lora=lora, training=training), base, tmp_path, report=lambda _: None, should_stop=lambda: False
    )
    parent = {"version": 1, "uri": done.uri, "digest": version_digest(done.files)}
    learnt = run_preview(
        lease_of(remark, run_id="run_2", lora=lora, parent=parent), base, tmp_path, report=lambda _: None
    ).preview
    assert (fresh.version, learnt.version) == (0, 1)
    assert learnt.expected_drift < 0.2 * fresh.expected_drift, "what was learnt is no drift any more"
    assert learnt.items[0].acts, "the teacher is the base model, and acts as before"
    assert all(torch.equal(before[k], v) for k, v in base.module.state_dict().items())
    assert version_digest(done.files) == parent["digest"]


def test_half_characters_are_shown_as_bytes(base: BaseModel, show: Show) -> None:
    text = "lima. \N{ROCKET}"
    [item] = show("ok", response=text).items
    pieces = b"".join(bytes(t.bytes) if t.bytes is not None else t.text.encode() for t in item.tokens[:-1])
    assert pieces.decode() == text
    assert any(t.bytes is not None for t in item.tokens)


@pytest.mark.parametrize(
    ("piece", "wanted"), [("<0xE2>", [0xE2]), ("Ġð", [0x20, 0xF0]), ("Ń", [0xAD]), ("▁ключ", None), ("A!", [65, 33])]
)
def test_bytes_of_vocabulary_entries(piece: str, wanted: list[int] | None) -> None:
    assert token_bytes(piece) == wanted


def views(n: int, **fields: Any) -> AnswerView:
    token = TokenView(
        id=65, text="a", student=-1.0, told=-2.0, untold=-1.0, distance=0.5, effect=1.0, instead=65, instead_text="a",
        instead_logp=-0.5,
    )  # fmt: skip
    return AnswerView((replace(token, **fields),) * n, 1.0)


def test_long_answers_are_cut_by_name_and_counted_whole(base: BaseModel, lease_of: Any) -> None:
    shown = Explanation((views(5000), views(10)), 0.5, 1.0, 1.0, 0.5)
    long, short = preview_of(lease_of("a", "b"), shown, base.tokenizer).items
    assert len(long.tokens) == MAX_PREVIEW_TOKENS // 2
    assert long.tokens_left_out == 5000 - MAX_PREVIEW_TOKENS // 2
    assert (long.response_tokens, long.mean_gap) == (5000, 1.0)
    assert (len(short.tokens), short.tokens_left_out) == (10, 0)


def test_an_answer_that_teaches_nothing_has_no_tokens(base: BaseModel, lease_of: Any) -> None:
    [item] = preview_of(lease_of("a"), Explanation((AnswerView((), 0.0),), 0.0, 0.0, 0.0, 0.5), base.tokenizer).items
    assert (item.acts, item.response_tokens, item.tokens, item.largest_gap) == (False, 0, [], 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_none_fail_the_job(base: BaseModel, lease_of: Any, bad: float) -> None:
    with pytest.raises(TrainingFailedError) as caught:
        preview_of(lease_of("a"), Explanation((views(1, student=bad),), 0.5, 1.0, 1.0, 0.5), base.tokenizer)
    assert (caught.value.code, caught.value.retryable) == ("not_finite", False)
