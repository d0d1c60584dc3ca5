# ruff: noqa: ARG005 - every case is called alike
"""What public functions are given: None, generators and numbers of a wrong kind are taken or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import (
    AdapterError,
    LoraPolicy,
    LoraSpec,
    Options,
    Probe,
    Sample,
    SdpoError,
    attach_lora,
    attached,
    chat_ids,
    explain,
    learnt_from,
    load_optimizer,
    make_optimizer,
    save_optimizer,
    teacher_messages,
    teacher_prompt,
    teacher_targets,
    teacher_written,
    train_batch,
    update_standing,
    usable_remarks,
    withdraw,
)

OPTIONS = Options(top_k=7, steps=1, stop_gap=0.0, learning_rate=5e-3)
SAMPLES = [Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3)), Sample((1, 4), (4, 5), (1, 9))]
CHAT = [{"role": "user", "content": "hello"}]
Wrong = Callable[[LoraPolicy, Any, Any], object]


@pytest.fixture
def policy(base: Qwen3ForCausalLM) -> LoraPolicy:
    return attach_lora(base, LoraSpec(rank=4))


def standing(policy: Any, tokenizer: Any, **given: Any) -> object:
    given = {"standing": ["a"], "new": ["b"], "probes": [], **given}
    return update_standing(policy, tokenizer, given.pop("standing"), given.pop("new"), given.pop("probes"), **given)


def told(tokenizer: Any, **given: Any) -> object:
    return teacher_prompt(tokenizer, CHAT, "be brief", **{"limit": 500, **given})


NONE: dict[str, Wrong] = {
    "chat_ids tokenizer": lambda _, t, none: chat_ids(none, CHAT),
    "chat_ids messages": lambda _, t, none: chat_ids(t, none),
    "teacher_messages messages": lambda _, t, none: teacher_messages(none, ["a"]),
    "teacher_messages remarks": lambda _, t, none: teacher_messages(CHAT, none),
    "teacher_prompt tokenizer": lambda _, t, none: told(none),
    "teacher_prompt standing": lambda _, t, none: told(t, standing=none),
    "teacher_prompt limit": lambda _, t, none: told(t, limit=none),
    "teacher_prompt repetitions": lambda _, t, none: told(t, repetitions=none),
    "usable_remarks": lambda _, t, none: usable_remarks(none),
    "withdraw standing": lambda _, t, none: withdraw(none, "a"),
    "withdraw remark": lambda _, t, none: withdraw(["a"], none),
    "standing policy": lambda p, t, none: standing(none, t),
    "standing standing": lambda p, t, none: standing(p, t, standing=none),
    "standing new": lambda p, t, none: standing(p, t, new=none),
    "standing probes": lambda p, t, none: standing(p, t, probes=none),
    "standing eps": lambda p, t, none: standing(p, t, eps=none),
    "attach_lora base": lambda p, t, none: attach_lora(none, LoraSpec()),
    "attach_lora spec": lambda p, t, none: attach_lora(p.model, none),
    "make_optimizer policy": lambda p, t, none: make_optimizer(none, OPTIONS),
    "make_optimizer options": lambda p, t, none: make_optimizer(p, none),
    "train policy": lambda p, t, none: train_batch(none, make_optimizer(p, OPTIONS), SAMPLES, OPTIONS),
    "train optimizer": lambda p, t, none: train_batch(p, none, SAMPLES, OPTIONS),
    "train samples": lambda p, t, none: train_batch(p, make_optimizer(p, OPTIONS), none, OPTIONS),
    "train options": lambda p, t, none: train_batch(p, make_optimizer(p, OPTIONS), SAMPLES, none),
    "targets policy": lambda p, t, none: teacher_targets(none, SAMPLES, OPTIONS),
    "targets samples": lambda p, t, none: teacher_targets(p, none, OPTIONS),
    "explain policy": lambda p, t, none: explain(none, t, SAMPLES, OPTIONS),
    "explain samples": lambda p, t, none: explain(p, t, none, OPTIONS),
    "explain untold": lambda p, t, none: explain(p, t, SAMPLES, OPTIONS, untold_prompts=[none, none]),
    "explain threshold": lambda p, t, none: explain(p, t, SAMPLES, OPTIONS, threshold=none),
    "learnt_from policy": lambda p, t, none: learnt_from(none, SAMPLES, "own"),
    "learnt_from samples": lambda p, t, none: learnt_from(p, none, "own"),
    "learnt_from rollouts": lambda p, t, none: learnt_from(p, SAMPLES, none),
    "learnt_from batch_tokens": lambda p, t, none: learnt_from(p, SAMPLES, "own", batch_tokens=none),
    "teacher_written policy": lambda p, t, none: teacher_written(none, SAMPLES, 3),
    "teacher_written samples": lambda p, t, none: teacher_written(p, none, 3),
    "teacher_written max_new_tokens": lambda p, t, none: teacher_written(p, SAMPLES, none),
    "sample": lambda p, t, none: Sample(none, (1,), (2,)),
    "options": lambda p, t, none: Options(eps=none),
}


@pytest.mark.parametrize("name", NONE)
def test_none_is_refused_by_name(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(SdpoError):
        NONE[name](policy, tokenizer, None)


WRONG_NUMBERS: dict[str, Wrong] = {
    "limit text": lambda p, t, _: told(t, limit="900"),
    "limit fraction": lambda p, t, _: told(t, limit=900.0),
    "limit yes": lambda p, t, _: told(t, limit=True),
    "tools": lambda p, t, _: told(t, tools=5),
    "template options": lambda p, t, _: told(t, template_options=["a"]),
    "eps": lambda p, t, _: standing(p, t, eps=math.nan),
    "eps below 0": lambda p, t, _: standing(p, t, eps=-0.5),
    "max_items": lambda p, t, _: standing(p, t, max_items=0),
    "max_tokens": lambda p, t, _: standing(p, t, max_tokens=1e3),
    "max_probes": lambda p, t, _: standing(p, t, max_probes="8"),
    "max_new_tokens": lambda p, t, _: standing(p, t, max_new_tokens=0),
    "threshold": lambda p, t, _: explain(p, t, SAMPLES, OPTIONS, threshold=math.nan),
    "written": lambda p, t, _: teacher_written(p, SAMPLES, 0),
    "learnt": lambda p, t, _: learnt_from(p, SAMPLES, "teacher", max_new_tokens=0),
    "budget": lambda p, t, _: learnt_from(p, SAMPLES, "teacher", batch_tokens=-1),
    "AdamW's eps": lambda p, t, _: Options(eps=math.nan),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_numbers_of_a_wrong_kind_are_refused_by_name(
    policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    with pytest.raises(SdpoError):
        WRONG_NUMBERS[name](policy, tokenizer, None)


def test_generators_are_read_once(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast) -> None:
    def each(values: Any) -> Any:
        return (value for value in values)

    assert usable_remarks(each(["a", "b", "a"])) == ["b", "a"]
    assert teacher_messages(CHAT, each(["a"])) == teacher_messages(CHAT, ["a"])
    assert withdraw(each(["a", "b"]), "a") == ("b",)
    assert told(tokenizer, standing=each(["a"])) == told(tokenizer, standing=["a"])
    assert standing(policy, tokenizer, new=each(["b"]), probes=each([Probe(CHAT, ())])) == standing(policy, tokenizer)
    assert len(teacher_written(policy, each(SAMPLES), 2)) == 2
    untold = each([each((1, 2)), each((3,))])
    assert len(explain(policy, tokenizer, SAMPLES, OPTIONS, untold_prompts=untold).answers) == 2
    targets = each(teacher_targets(policy, SAMPLES, OPTIONS))
    assert train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS, targets=targets).updates == 1


@pytest.mark.parametrize("targets", [5, [None, None], "ab"])
def test_targets_of_a_wrong_kind_are_refused(policy: LoraPolicy, targets: Any) -> None:
    with pytest.raises(SdpoError):
        train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS, targets=targets)


def test_moments_that_no_training_leaves_are_refused(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    """AdamW takes the root of the mean square: below 0 it would be nan at the first step."""
    with attached(base, LoraSpec()) as policy:
        optimizer = make_optimizer(policy, OPTIONS)
        train_batch(policy, optimizer, SAMPLES, OPTIONS)
        save_optimizer(policy, optimizer, tmp_path)
        load_optimizer(policy, OPTIONS, tmp_path)
        meta, moments = tmp_path / "optimizer.json", tmp_path / "optimizer.safetensors"
        good, tensors = json.loads(meta.read_text()), load_file(moments)
        name = next(iter(good["steps"]))
        for count in ("x", None, 1.5, -1):
            meta.write_text(json.dumps(good | {"steps": good["steps"] | {name: count}}))
            with pytest.raises(AdapterError, match="steps of"):
                load_optimizer(policy, OPTIONS, tmp_path)
        meta.write_text(json.dumps(good))
        broken = {key: value.clone() for key, value in tensors.items()}
        broken[f"exp_avg_sq.{name}"].view(-1)[-1] = -1e-12
        save_file(broken, moments)
        with pytest.raises(AdapterError, match="below 0") as caught:
            load_optimizer(policy, OPTIONS, tmp_path)
        assert caught.value.code == "foreign_optimizer"


def test_known_risks_are_warnings_of_the_batch(policy: LoraPolicy) -> None:
    """Beside the others, and where nothing is taught as well; the defaults have none."""
    risky = OPTIONS.replace(alpha=1e-9)
    assert len(risky.cautions) == 2
    assert any("nearly 0" in caution for caution in risky.cautions)
    assert not any("nearly 0" in c for alpha in (0.0, 0.1, 0.5, 1.0) for c in Options(alpha=alpha).cautions)
    for samples in (SAMPLES, []):
        result = train_batch(policy, make_optimizer(policy, risky), samples, risky)
        assert [w.code for w in result.warnings] == ["risky_option", "risky_option"]
        assert tuple(w.message for w in result.warnings) == risky.cautions
        assert train_batch(policy, make_optimizer(policy, OPTIONS), samples, OPTIONS).warnings == ()
    with torch.no_grad():
        policy.trainable()[0][1].fill_(math.nan)
    both = train_batch(policy, make_optimizer(policy, risky), SAMPLES, risky).warnings
    assert [w.code for w in both] == ["risky_option", "risky_option", "non_finite_step"]
