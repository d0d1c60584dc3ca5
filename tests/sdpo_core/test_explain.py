"""The preview of a batch: by hand, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import (
    Explanation,
    LoraPolicy,
    LoraSpec,
    Options,
    Sample,
    SampleError,
    attach_lora,
    explain,
    make_optimizer,
)
from sdpo_core import train_batch as train
from sdpo_core.policy import response_logits
from sdpo_core.samples import token_batch

OPTIONS = Options(support="full", steps=1, stop_gap=0.0)
SAMPLES = [
    Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3)),
    Sample((1, 2), (5,), (3,), taught=False),
    Sample((1, 4, 4, 9), (4, 5), (1, 9, 8)),
]


@pytest.fixture
def policy(chat_base: Qwen3ForCausalLM) -> LoraPolicy:
    made = attach_lora(chat_base, LoraSpec(rank=4, alpha=8))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in made.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return made


@torch.no_grad()
def logp(policy: LoraPolicy, prompt: tuple[int, ...], response: tuple[int, ...], *, adapter: bool) -> Tensor:
    batch = token_batch([prompt], [response], policy.device)
    return torch.log_softmax(response_logits(policy, batch, adapter=adapter)[0].double(), -1)


def preview(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast, threshold: float = 0.25) -> Explanation:
    return explain(policy, tokenizer, SAMPLES, OPTIONS, threshold=threshold)


def test_every_number_by_hand(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast) -> None:
    shown = preview(policy, tokenizer)
    distances, effects = [], []
    for sample, answer in zip(SAMPLES, shown.answers, strict=True):
        if not sample.live:
            assert (answer.tokens, answer.peak_effect) == ((), 0.0)
            continue
        student = logp(policy, sample.prompt_ids, sample.response_ids, adapter=True)
        told = logp(policy, sample.teacher_prompt_ids, sample.response_ids, adapter=False)
        untold = logp(policy, sample.prompt_ids, sample.response_ids, adapter=False)
        for t, (y, view) in enumerate(zip(sample.response_ids, answer.tokens, strict=True)):
            assert (view.id, view.text) == (y, tokenizer.decode([y]))
            for got, want in ((view.student, student), (view.told, told), (view.untold, untold)):
                assert got == pytest.approx(float(want[t, y]), rel=1e-4)
            assert view.gap == pytest.approx(float(told[t, y] - student[t, y]), abs=1e-4)
            assert view.instead == int(told[t].argmax())
            assert view.instead_text == tokenizer.decode([view.instead])
            assert view.instead_logp == pytest.approx(float(told[t].max()), abs=1e-4)
            distances.append(float((told[t].exp() * (told[t] - student[t])).sum()))
            effects.append(float((told[t].exp() * (told[t] - untold[t])).sum()))
        views = [(v.distance, v.effect) for v in answer.tokens]
        n = len(views)
        assert [x for v in views for x in v] == pytest.approx(
            [x for pair in zip(distances[-n:], effects[-n:], strict=True) for x in pair], rel=1e-3, abs=1e-5
        )
        assert answer.peak_effect == pytest.approx(max(effects[-n:]), rel=1e-3)
    assert shown.expected_drift == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    cut = sorted(effects)[2] + 1e-6
    assert preview(policy, tokenizer, cut).acting_tokens == pytest.approx(3 / 6)


def test_the_drift_foreseen_is_what_training_sets_out_to_close(
    policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The gap merges what is outside the teacher's top 100. And looking moves nothing."""
    before = [p.detach().clone() for _, p in policy.trainable()]
    shown = preview(policy, tokenizer)
    assert all(torch.equal(b, p) and p.grad is None for b, (_, p) in zip(before, policy.trainable(), strict=True))
    step = train(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS).steps[0]
    assert shown.expected_drift == pytest.approx(step.distill_loss, rel=1e-5)
    assert 0.5 * shown.expected_drift < step.gap < shown.expected_drift


def test_feedback_that_the_teacher_ignores_is_seen(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast) -> None:
    """Told and untold prompt the same: there is distance left, and none of it comes from the feedback."""
    same = [Sample(s.prompt_ids, s.response_ids, s.prompt_ids) for s in SAMPLES]
    shown = explain(policy, tokenizer, same, OPTIONS)
    assert (shown.acting_tokens, shown.acting_answers) == (0.0, 0.0)
    assert shown.expected_drift > 0


def test_the_effect_is_that_of_what_the_teacher_is_not_told_otherwise(
    policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What stands already is read both times: then it is no effect of this feedback. The rest does not change."""
    plain = preview(policy, tokenizer)
    stands = [(7, 7, *s.prompt_ids) for s in SAMPLES]
    shown = explain(policy, tokenizer, SAMPLES, OPTIONS, untold_prompts=stands)
    for sample, prompt, answer, before in zip(SAMPLES, stands, shown.answers, plain.answers, strict=True):
        if sample.live:
            want = logp(policy, prompt, sample.response_ids, adapter=False)
            picked = [float(want[t, y]) for t, y in enumerate(sample.response_ids)]
            assert [t.untold for t in answer.tokens] == pytest.approx(picked, rel=1e-4)
        assert [t.distance for t in answer.tokens] == pytest.approx([t.distance for t in before.tokens])
    told = explain(policy, tokenizer, SAMPLES, OPTIONS, untold_prompts=[s.teacher_prompt_ids for s in SAMPLES])
    assert told.acting_tokens == 0.0
    with pytest.raises(SampleError, match="1 untold prompts"):
        explain(policy, tokenizer, SAMPLES, OPTIONS, untold_prompts=stands[:1])


def test_nothing_taught_is_nothing_to_show(policy: LoraPolicy, tokenizer: PreTrainedTokenizerFast) -> None:
    shown = explain(policy, tokenizer, [SAMPLES[1]], OPTIONS)
    assert (shown.expected_drift, shown.acting_tokens, shown.acting_answers) == (0.0, 0.0, 0.0)
