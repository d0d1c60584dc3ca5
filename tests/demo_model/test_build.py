"""The builder: deterministic rows and weights, remarks in an order the right answer agrees with."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from demo import tasks
from demo.model_build import build
from demo.model_build.rows import EARLY, LATE, Mix, Row, rows
from demo.model_build.tokenizer import train_tokenizer
from demo.model_build.train import Encoded, TrainConfig, answer_loss, batches, encode, make_model, train
from demo.tasks import PREFERENCES
from sdpo_core.teacher_context import DEFAULT_TEMPLATE

ONLY_STACKS = Mix(plain=0, one=0, stack=1, neutral=0, correction=0, demonstration=0, dense=0)


def _take(seed: int, n: int, mix: Mix) -> list[Row]:
    return list(itertools.islice(rows(seed, lambda _: mix), n))


def _remarks(row: Row) -> list[str]:
    _, _, block = row.messages[-1]["content"].partition(DEFAULT_TEMPLATE.header + "\n")
    return [line.removeprefix(DEFAULT_TEMPLATE.bullet) for line in block.split("\n") if line]


def _plainly(remark: str) -> str:
    return remark.lower().removesuffix(".")


def test_rows_are_the_same_for_the_same_seed() -> None:
    assert _take(1, 200, LATE) == _take(1, 200, LATE)
    assert _take(1, 200, LATE) != _take(2, 200, LATE)


def test_no_row_contains_a_heldout_prompt() -> None:
    for mix in (EARLY, LATE):
        for row in _take(5, 3000, mix):
            for message in row.messages:
                prompt = message["content"].partition("\n\n")[0]
                assert message["role"] != "user" or not tasks.is_heldout(prompt)


def test_of_each_factor_the_last_remark_is_obeyed() -> None:
    """Independent of the builder: find out which preference each line asks for, then read the answer."""
    asked_by = {_plainly(r): key for key, p in PREFERENCES.items() for r in p.remarks}
    contradicted = 0
    for row in _take(7, 1500, ONLY_STACKS):
        keys = [asked_by[r] for r in map(_plainly, _remarks(row)) if r in asked_by]
        style = {PREFERENCES[k].factor: k for k in keys}
        contradicted += len(style) < len(set(keys))
        found = tasks.read(row.answer).style
        assert {f: getattr(found, f) for f in style} == style, row
    assert contradicted > 200


def test_blocks_have_one_to_six_remarks() -> None:
    sizes = {len(_remarks(row)) for row in _take(7, 1500, ONLY_STACKS)}
    assert sizes == {1, 2, 3, 4, 5, 6}


def test_batches_lose_no_row_and_hold_rows_of_similar_length() -> None:
    rng = random.Random(0)  # noqa: S311 - not for secrets
    stream = [Encoded([i] * rng.randint(1, 90), 1) for i in range(8 * 16)]
    cut = list(itertools.islice(batches(iter(stream), 8, seed=0), 16))
    assert sorted(e.ids for b in cut for e in b) == sorted(e.ids for e in stream)
    spread = [max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in cut]
    assert max(spread) < 30


@pytest.fixture(scope="module")
def small() -> TrainConfig:
    return TrainConfig(steps=3, batch_rows=4, vocab_size=400, hidden=32, layers=1, heads=1, ffn=32, threads=1)


def test_the_loss_is_that_of_the_rows_one_by_one(small: TrainConfig) -> None:
    """Naive formula: the whole row through the model, -log p of each answer token given what precedes it."""
    tokenizer = train_tokenizer(0, small.vocab_size, chats=50)
    model = make_model(small, tokenizer).eval()
    encoded = [encode(tokenizer, row) for row in _take(0, 6, LATE)]
    log_probs = []
    for e in encoded:
        logits_TV = model(torch.tensor([e.ids])).logits[0].double()
        for t in range(len(e.ids) - e.answer_tokens, len(e.ids)):
            log_probs.append(logits_TV[t - 1].log_softmax(-1)[e.ids[t]].item())
        assert e.ids[-1] == tokenizer.eos_token_id
    naive = -sum(log_probs) / len(log_probs)
    assert answer_loss(model, encoded).item() == pytest.approx(naive, rel=1e-5)


def test_training_is_repeatable_and_moves_the_weights(small: TrainConfig) -> None:
    tokenizer = train_tokenizer(0, small.vocab_size, chats=50)
    losses: list[list[float]] = [[], []]
    for run in losses:
        train(small, tokenizer, lambda _, loss, __, run=run: run.append(loss))  # type: ignore[misc]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_build_writes_a_model_that_loads_with_card_and_figures(tmp_path: Path) -> None:
    build.main(["--out", str(tmp_path), "--steps", "2", "--prompts", "1", "--threads", "1"])
    model, tokenizer = build.load(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    figures = json.loads((tmp_path / build.FIGURES).read_text())
    assert figures["prompts"] == 1
    assert f"{figures['size']['parameters']:,} parameters" in (tmp_path / "README.md").read_text()
