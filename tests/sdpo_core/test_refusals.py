"""What a batch is refused for before anything is trained: foreign targets and optimizers, unreadable text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import (
    AdapterError,
    ContextTooLong,
    LoraPolicy,
    LoraSpec,
    OptionError,
    Options,
    Sample,
    SampleError,
    TargetError,
    attach_lora,
    attached,
    chat_ids,
    explain,
    learnt_from,
    make_ema,
    make_optimizer,
    teacher_messages,
    teacher_prompt,
    teacher_targets,
    teacher_written,
    train_batch,
    update_standing,
    usable_remarks,
    withdraw,
)
from tests.sdpo_core.conftest import tiny_model

OPTIONS = Options(top_k=7, steps=2, stop_gap=0.0, learning_rate=5e-3)
SAMPLES = [
    Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3)),
    Sample((1, 4, 4, 9), (4, 5, 9, 8), (1, 9, 8), (-1.0, -2.0, -1.0, -0.5)),
    Sample((1, 2), (), (3,)),
]


@pytest.fixture
def policy(base: Qwen3ForCausalLM) -> LoraPolicy:
    made = attach_lora(base, LoraSpec(rank=4))
    with torch.no_grad():
        for _, parameter in made.trainable():
            parameter.add_(0.02)
    return made


def weights(policy: LoraPolicy) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in policy.trainable()]


SAMPLED = OPTIONS.replace(alpha=1.0, support="sampled", top_k=None)
MIXED = OPTIONS.replace(teacher_mix=0.2)
FOREIGN: dict[str, tuple[Options, Options, str]] = {
    "top_k": (OPTIONS.replace(top_k=8), OPTIONS, "other options"),
    "outside": (OPTIONS.replace(outside="renormalise", alpha=0.5), OPTIONS.replace(alpha=0.5), "other options"),
    "sampled": (SAMPLED, OPTIONS, "other options"),
    "floor": (SAMPLED.replace(top_k=5), SAMPLED.replace(top_k=5, sampled_floor=-9.0), "other options"),
    "full": (OPTIONS.replace(support="full"), OPTIONS, "other options"),
    "teacher": (OPTIONS.replace(teacher="previous"), OPTIONS, "another teacher"),
    "mix": (MIXED, MIXED.replace(teacher_mix=0.3), "another teacher"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_targets_of_other_options_are_refused(policy: LoraPolicy, name: str) -> None:
    scored, used, said = FOREIGN[name]
    before, targets = weights(policy), teacher_targets(policy, SAMPLES, scored)
    with pytest.raises(TargetError, match=said) as caught:
        train_batch(policy, make_optimizer(policy, used), SAMPLES, used, targets=targets)
    assert caught.value.code == "foreign_targets"
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_targets_of_other_samples_are_refused(policy: LoraPolicy) -> None:
    """Same lengths throughout: only the tokens, or what the teacher was told, differ."""
    targets = teacher_targets(policy, SAMPLES, OPTIONS)
    first = SAMPLES[0]
    for other in (
        [SAMPLES[1], SAMPLES[0], SAMPLES[2]],
        [replace(first, response_ids=(4, 5, 6, 8)), *SAMPLES[1:]],
        [replace(first, teacher_prompt_ids=(1, 9, 8, 2, 4)), *SAMPLES[1:]],
    ):
        with pytest.raises(TargetError, match="another answer"):
            train_batch(policy, make_optimizer(policy, OPTIONS), other, OPTIONS, targets=targets)
    bare: Any = [t.target for t in targets]
    with pytest.raises(TargetError, match="teacher_targets"):
        train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS, targets=bare)


def test_targets_of_a_teacher_that_has_moved_are_refused(policy: LoraPolicy) -> None:
    ema = make_ema(policy)
    for options, state in (
        (OPTIONS.replace(teacher="ema"), ema), (OPTIONS.replace(teacher="previous"), None), (MIXED, None),
    ):  # fmt: skip
        targets = teacher_targets(policy, SAMPLES, options, ema=state)
        optimizer = make_optimizer(policy, options)
        assert train_batch(policy, optimizer, SAMPLES, options, ema=state, targets=targets).updates == 2
        with pytest.raises(TargetError, match="another teacher"):
            train_batch(policy, optimizer, SAMPLES, options, ema=state, targets=targets)


def test_targets_of_another_base_are_refused(policy: LoraPolicy) -> None:
    with attached(tiny_model(seed=1), LoraSpec(rank=4)) as other:
        targets = teacher_targets(other, SAMPLES, OPTIONS)
    with pytest.raises(TargetError, match="another base"):
        train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS, targets=targets)


def test_targets_go_with_their_samples(policy: LoraPolicy) -> None:
    """Scored one by one as feedback comes, joined in another order; and alpha does not matter to what is kept."""
    whole = train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS.replace(alpha=1.0, steps=1))
    fresh = attach_lora(tiny_model(), LoraSpec(rank=4))
    with torch.no_grad():
        for _, parameter in fresh.trainable():
            parameter.add_(0.02)
    alone = [teacher_targets(fresh, [sample], OPTIONS)[0] for sample in SAMPLES]
    result = train_batch(
        fresh, make_optimizer(fresh, OPTIONS), SAMPLES[::-1], OPTIONS.replace(alpha=1.0, steps=1), targets=alone[::-1]
    )
    assert result.steps[0].loss == pytest.approx(whole.steps[0].loss, rel=1e-4)


def test_an_optimizer_of_another_adapter_is_refused(policy: LoraPolicy) -> None:
    other = attach_lora(tiny_model(), LoraSpec(rank=4))
    some = torch.optim.AdamW([p for _, p in policy.trainable()][:3])
    for optimizer in (make_optimizer(other, OPTIONS), some):
        with pytest.raises(AdapterError, match="make_optimizer") as caught:
            train_batch(policy, optimizer, SAMPLES, OPTIONS)
        assert caught.value.code == "foreign_optimizer"


def test_the_rate_of_the_options_is_the_one_that_counts(policy: LoraPolicy) -> None:
    optimizer = make_optimizer(policy, OPTIONS.replace(learning_rate=0.5, weight_decay=0.5))
    result = train_batch(policy, optimizer, SAMPLES, OPTIONS)
    assert {m.learning_rate for m in result.steps} == {OPTIONS.learning_rate}
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (5e-3, OPTIONS.betas, 0.0)


LONG = (5,) * 509
Asked = Callable[[LoraPolicy, Sequence[Sample], PreTrainedTokenizerFast], object]
ASKED: dict[str, Asked] = {
    "train": lambda p, s, _: train_batch(p, make_optimizer(p, OPTIONS), s, OPTIONS),
    "targets": lambda p, s, _: teacher_targets(p, s, OPTIONS),
    "explain": lambda p, s, tokenizer: explain(p, tokenizer, s, OPTIONS),
    "write": lambda p, s, _: learnt_from(p, s, "teacher"),
}


@pytest.mark.parametrize("name", ASKED)
def test_text_that_the_model_cannot_read_is_refused(
    policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """The window has 512 tokens, the vocabulary 64 entries."""
    for sample in (Sample(LONG, (1, 2, 3, 4), (1,)), Sample((1,), (1, 2, 3, 4), LONG)):
        with pytest.raises(ContextTooLong) as caught:
            ASKED[name](policy, [sample], tokenizer)
        assert (caught.value.length, caught.value.limit, caught.value.code) == (513, 512, "context_too_long")
    for sample in (Sample((64,), (1,), (1,)), Sample((1,), (64,), (1,)), Sample((1,), (1,), (64,))):
        with pytest.raises(SampleError, match="vocabulary") as refused:
            ASKED[name](policy, [sample], tokenizer)
        assert refused.value.code == "unknown_token"
    dead = replace(Sample((64,) * 600, (1,), (1,)), taught=False)
    assert train_batch(policy, make_optimizer(policy, OPTIONS), [dead], OPTIONS).stop_reason == "nothing_to_teach"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt_ids": "hello"},
        {"prompt_ids": 5},
        {"prompt_ids": [[1, 2]]},
        {"response_ids": [1.5]},
        {"response_ids": [None]},
        {"teacher_prompt_ids": [-1]},
        {"prompt_ids": torch.tensor([[1, 2]])},
        {"behaviour_logprobs": 1.0},
        {"behaviour_logprobs": [-1.0, None]},
        {"behaviour_logprobs": ["a", "b"]},
        {"behaviour_logprobs": (0.5, 0.9)},
        {"behaviour_logprobs": (-1.0, 2e-3)},
        {"behaviour_logprobs": (-1.0, math.nan)},
        {"reward_advantage": "1"},
        {"reward_advantage": None},
    ],
)
def test_samples_of_wrong_types_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SampleError):
        Sample(**{"prompt_ids": (1, 2), "response_ids": (3, 4), "teacher_prompt_ids": (5,), **values})


def test_rows_of_numbers_of_any_kind_are_taken() -> None:
    want = Sample((1, 2), (3, 4), (5,), (-1.0, 0.0))
    kinds: list[Callable[[list[float]], Any]] = [list, np.array, torch.tensor]
    for kind in kinds:
        found = Sample(kind([1, 2]), kind([3, 4]), kind([5]), kind([-1.0, 0.0]))
        assert found == want
        assert type(found.prompt_ids[0]) is int
    assert Sample((1,), (2,), (3,), (1e-6,)).live  # an engine's rounding


USER = {"role": "user", "content": "hello"}


def test_text_parts_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    in_parts, plain = [{"role": "user", "content": parts}], [{"role": "user", "content": "one\ntwo"}]
    assert chat_ids(tokenizer, in_parts) == chat_ids(tokenizer, plain)
    assert teacher_messages(in_parts, ["be brief"]) == teacher_messages(plain, ["be brief"])
    told, untold = (teacher_prompt(tokenizer, m, "be brief", limit=500).ids for m in (in_parts, plain))
    assert told == untold


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "unsupported_content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "unsupported_content"),
        ([{"role": "user", "content": [7]}], "unsupported_content"),
        ([{"role": "user", "content": None}], "bad_message"),
        ([{"role": "user"}], "bad_message"),
        ([{"role": "user", "content": 5}], "bad_message"),
        ([{"role": "user", "content": {"text": "x"}}], "bad_message"),
        ([{"role": "user", "content": []}], "bad_message"),
        ([{"role": "User", "content": "x"}], "bad_message"),
        (["hello"], "bad_message"),
        ("hello", "bad_message"),
        ([], "bad_message"),
        ([{"role": "user", "content": "half \ud83d of a pair"}], "bad_text"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"a": "\udc00"}]}], "bad_text"),
    ],
)
def test_messages_that_are_no_text_are_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, messages: Any, code: str
) -> None:
    with pytest.raises(SampleError) as caught:
        chat_ids(tokenizer, messages)
    assert caught.value.code == code
    with pytest.raises(SampleError):
        teacher_prompt(tokenizer, messages, "be brief", limit=500)


def test_what_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SampleError, match="roles must alternate") as caught:
        chat_ids(tokenizer, [USER], template_options={"chat_template": strict})
    assert caught.value.code == "template_refused"


@pytest.mark.parametrize("remarks", ["a rule", [5], [None], ["ok", {"a": 1}]])
def test_remarks_are_a_list_of_texts(tokenizer: PreTrainedTokenizerFast, remarks: Any) -> None:
    asked: list[Callable[[], object]] = [
        lambda: usable_remarks(remarks),
        lambda: teacher_messages([USER], remarks),
        lambda: teacher_prompt(tokenizer, [USER], "own", remarks, limit=500),
        lambda: withdraw(remarks, "a"),
    ]
    for ask in asked:
        with pytest.raises(SampleError) as caught:
            ask()
        assert caught.value.code == "bad_remark"


@pytest.mark.parametrize("told", [{"feedback": 5}, {"feedback": ["x"]}, {"feedback": "\ud800"}, {"demonstration": 7}])
def test_feedback_is_text(tokenizer: PreTrainedTokenizerFast, told: dict[str, Any]) -> None:
    with pytest.raises(SampleError):
        teacher_prompt(tokenizer, [USER], **{"feedback": "own", **told}, limit=500)


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_skipped_tokens_count_nowhere(policy: LoraPolicy, path: str) -> None:
    """Against the same answers with those tokens in the prompts; and an answer of nothing else is a row without any."""
    options = OPTIONS.replace(path=path, aggregation="row-mean-token-mean", base_kl_weight=0.1, steps=1)
    whole, first = [*SAMPLES, Sample((1,), (2, 3), (4,), (-1.0, -1.0))], weights(policy)
    by_hand = [
        Sample((1, 2, 3, 4, 5), (6, 7), (1, 9, 8, 2, 3, 4, 5)),
        Sample((1, 4, 4, 9, 4, 5), (9, 8), (1, 9, 8, 4, 5), (-1.0, -0.5)),
        SAMPLES[2],
        Sample((1, 2, 3), (), (4, 2, 3), ()),
    ]
    steps = []
    for samples, skip in ((whole, 2), (by_hand, 0)):
        with torch.no_grad():
            for (_, parameter), before in zip(policy.trainable(), first, strict=True):
                parameter.copy_(before)
        chosen = options.replace(skip_tokens=skip)
        targets = teacher_targets(policy, samples, chosen)
        result = train_batch(policy, make_optimizer(policy, chosen), samples, chosen, targets=targets)
        assert [s.taught for s in result.samples] == [True, True, False, False]
        steps.append(replace(result.steps[0], seconds=0.0))
    assert steps[0] == steps[1]
    assert steps[0].response_tokens == 4


def test_lists_of_something_else_are_refused_and_generators_read_once(
    policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[Callable[[Any], Any]] = [
        lambda s: train_batch(policy, make_optimizer(policy, OPTIONS), s, OPTIONS).samples,
        lambda s: teacher_targets(policy, s, OPTIONS),
        lambda s: explain(policy, tokenizer, s, OPTIONS).answers,
        lambda s: learnt_from(policy, s, "own"),
    ]
    for ask in asked:
        assert len(ask(s for s in SAMPLES)) == len(SAMPLES)
        for wrong in (SAMPLES[0], [(1, 2)], ["a"]):
            with pytest.raises(SampleError, match="list of Sample"):
                ask(wrong)
    options: Any = {"steps": 1}
    with pytest.raises(OptionError, match="options"):
        train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, options)
    spec: Any = {"rank": 1}
    with pytest.raises(OptionError, match="spec"):
        attach_lora(tiny_model(), spec)
    assert teacher_written(policy, [], 3) == []
    one_string: Any = "ab"
    with pytest.raises(SampleError, match="list"):
        update_standing(policy, tokenizer, one_string, ["be brief"], [])
    with pytest.raises(OptionError, match="max_probes"):
        update_standing(policy, tokenizer, [], ["be brief"], [], max_probes=0)
