"""Standing feedback: bounds, and a judgement that is tested without any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import LoraSpec, Probe, attached, chat_ids, teacher_messages, update_standing
from sdpo_core.samples import token_batch
from sdpo_core.standing import merge, select, teacher_effect


@dataclass
class Obedient:
    """A teacher that obeys, per factor, the last remark it hears: "case=upper" sets case. Others say nothing to it.

    Its answers are the settings that differ from the defaults and that the questions at hand are about.
    """

    about: tuple[str, ...] = ("case", "end", "start")

    def answer(self, remarks: Sequence[str]) -> dict[str, str]:
        heard = dict(r.split("#")[0].split("=") for r in remarks if "=" in r)
        return {k: v for k, v in heard.items() if k in self.about and v != "default"}

    def __call__(self, without: Sequence[str], with_: Sequence[str]) -> list[Tensor]:
        """One answer with one token per factor, 5 nats where it changes."""
        a, b = self.answer(without), self.answer(with_)
        return [torch.tensor([5.0 * (a.get(k) != b.get(k)) for k in self.about])]


def test_paraphrases_leave_one_remark() -> None:
    batch = ["end=hope#1", "end=hope#2", "end=hope#3", "end=hope#1"] * 2
    assert len(select([], batch, Obedient()).remarks) == 1
    assert select(["end=hope#4"], batch, Obedient()).remarks == ("end=hope#4",)


def test_an_earlier_preference_stands_beside_a_new_one() -> None:
    result = select(["end=hope#1"], ["case=upper#1", "case=upper#2"], Obedient())
    assert result.remarks == ("end=hope#1", "case=upper#1")
    assert result.dropped == (("case=upper#2", "repeated"),)


def test_newest_wins_over_a_contradicted_one() -> None:
    assert select(["end=hope", "case=upper"], ["end=bye"], Obedient()).remarks == ("case=upper", "end=bye")


def test_going_back_to_the_default_drops_both() -> None:
    """The newest remark changes nothing by itself, yet it is what contradicts the older one."""
    result = select(["end=hope", "case=upper"], ["end=default"], Obedient())
    assert result.remarks == ("case=upper",)
    assert dict(result.dropped) == {"end=hope": "contradicted", "end=default": "changes_nothing"}


def test_praise_does_not_stand() -> None:
    result = select(["end=hope"], ["lovely", "thank you", "lovely"], Obedient())
    assert result.remarks == ("end=hope",)
    assert {why for _, why in result.dropped} == {"changes_nothing"}


def test_a_wish_that_is_fulfilled_without_being_said_stays() -> None:
    """A newer remark happens to bring it about; the next one may not."""

    @dataclass
    class Excitable(Obedient):
        def answer(self, remarks: Sequence[str]) -> dict[str, str]:
            shouts = {"case": "upper"} if "start=wow" in remarks else {}
            return {**super().answer(remarks), **shouts}

    assert select(["case=upper"], ["start=wow"], Excitable()).remarks == ("case=upper", "start=wow")


def test_what_the_answers_cannot_show_is_not_decided() -> None:
    """The answers leave what is asked for at the first token: nothing behind it shows whether a later wish holds."""

    class Blind(Obedient):
        def __call__(self, without: Sequence[str], with_: Sequence[str]) -> list[Tensor]:
            (shift,) = super().__call__(without, with_)
            started = any("start" in self.answer(r) for r in (without, with_))
            first, *rest = self.about
            assert first == "start"
            return [torch.cat([shift[:1], torch.full((len(rest),), math.nan)]) if started else shift]

    teacher = Blind(about=("start", "case", "end"))
    assert select(["end=hope"], ["start=wow"], teacher).remarks == ("end=hope", "start=wow")
    assert select(["start=wow"], ["end=hope"], teacher).remarks == ("start=wow", "end=hope")


def test_no_verdict_on_answers_that_were_not_judged_to_their_end() -> None:
    """The student wrote what the teacher never would: where that begins, looking ends. That is no proof of praise."""
    nan = math.nan
    cut = [torch.tensor([0.001, nan, nan]), torch.tensor([0.002, 0.001, nan])]
    whole = [*cut, torch.tensor([0.001, 0.002, 0.001])]
    assert select([], ["end=hope"], lambda *_: cut).remarks == ("end=hope",)
    result = select([], ["well done"], lambda *_: whole)
    assert result.dropped == (("well done", "changes_nothing"),)


def test_repeats_that_slipped_in_are_merged_into_the_older_one() -> None:
    result = select(["end=hope#1", "end=hope#2", "case=upper"], ["lovely"], Obedient())
    assert result.remarks == ("end=hope#1", "case=upper")


def test_a_remark_about_other_questions_is_kept() -> None:
    """These questions cannot show whether it still holds."""
    teacher = Obedient(about=("case",))
    assert select(["end=hope"], ["case=upper"], teacher).remarks == ("end=hope", "case=upper")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["case", "end", "start"]).flatmap(
        lambda f: st.sampled_from([f"{f}={v}#{n}" for v in ("x", "y", "default") for n in (1, 2)])), max_size=8),
    st.integers(1, 4),
)  # fmt: skip
def test_what_stands_says_the_same_as_everything_said(remarks: list[str], size: int) -> None:
    """After any history in batches, the kept remarks make an obedient teacher answer as all would; none is idle."""
    teacher = Obedient()
    kept: tuple[str, ...] = ()
    for start in range(0, len(remarks), size):
        kept = select(kept, remarks[start : start + size], teacher).remarks
    said = list(dict.fromkeys(reversed(remarks)))[::-1]
    assert teacher.answer(kept) == teacher.answer(said)
    assert all(teacher.answer([x for x in kept if x != r]) != teacher.answer(kept) for r in kept)


def test_merge_bounds_count_and_tokens() -> None:
    older, new = ["a a a", "b b"], ["c", "b b", "d"]
    assert merge(older, new, count_tokens=len) == ["a a a", "c", "b b", "d"]
    assert merge(older, new, max_items=2, count_tokens=len) == ["b b", "d"]
    assert merge(older, new, max_tokens=5, count_tokens=len) == ["c", "b b", "d"]
    assert merge(older, [" "], count_tokens=len) == older


def test_effect_is_the_frozen_teachers_mean_kl(chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against one sequence at a time; a trained adapter on board changes nothing."""
    probes = [
        Probe([{"role": "user", "content": text}], tuple(tokenizer.encode(answer)))
        for text, answer in (("hello", "he said"), ("tell me all", "ok"))
    ]
    kls: list[list[float]] = []
    for p in probes:
        logps = []
        for remarks in (["one"], ["two", "one"]):
            ids = chat_ids(tokenizer, teacher_messages(p.messages, remarks))
            with torch.no_grad():
                out = chat_base(torch.tensor([[*ids, *p.response_ids]])).logits[0, len(ids) - 1 : -1]
            logps.append(torch.log_softmax(out.double(), -1))
        kls.append([])
        for t, y in enumerate(p.response_ids):
            kls[-1].append(float((logps[1][t].exp() * (logps[1][t] - logps[0][t])).sum()))
            if min(float(logps[0][t, y]), float(logps[1][t, y])) < math.log(0.02):
                kls[-1] += [math.nan] * (len(p.response_ids) - t - 1)
                break
    want = torch.tensor([kl for answer in kls for kl in answer]).double()
    with attached(chat_base, LoraSpec()) as policy:
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.add_(0.1)
        for budget in (10_000, 1):
            effect = teacher_effect(policy, tokenizer, probes, micro_batch_tokens=budget)
            for _ in range(2):  # the second time from memory
                shift = effect(["one"], ["two", "one"])
                assert [len(kl_T) for kl_T in shift] == [len(p.response_ids) for p in probes]
                torch.testing.assert_close(torch.cat(list(shift)), want, atol=1e-4, rtol=1e-4, equal_nan=True)
            assert torch.cat(list(effect(["one"], ["one"]))).nan_to_num(0.0).abs().max() == 0
        batch = token_batch([[1]], [[2]], policy.device)
        assert not torch.equal(policy.logits(batch, adapter=True), policy.logits(batch, adapter=False))


def test_without_answers_to_judge_by_the_merged_list_stands(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with attached(chat_base, LoraSpec()) as policy:
        probes = [Probe([{"role": "user", "content": "x"}], ())]
        result = update_standing(policy, tokenizer, ["a"], ["b", "a"], probes)
        assert result.remarks == ("b", "a")
        bounded = update_standing(policy, tokenizer, ["a"], ["b"], probes, max_items=1)
        assert bounded.remarks == ("b",)
        assert bounded.dropped == (("a", "over_the_bound"),)
