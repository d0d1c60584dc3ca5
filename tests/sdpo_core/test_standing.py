"""Standing feedback: bounds, and a judgement that is tested without any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import BarePolicy, LoraSpec, Probe, attached, chat_ids, teacher_messages, teacher_prompt, update_standing
from sdpo_core.hearing import Hearing
from sdpo_core.samples import token_batch
from sdpo_core.standing import Standing, merge, select
from tests.sdpo_core.conftest import TEMPLATE


@dataclass
class Obedient:
    """A teacher that obeys, per factor, the last remark it hears: "case=upper" sets case. Others say nothing to it.

    Its answers are the settings that differ from the defaults and that the questions at hand are about.
    """

    about: tuple[str, ...] = ("case", "end", "start")

    def answer(self, remarks: Sequence[str]) -> dict[str, str]:
        heard = dict(r.split("#")[0].split("=") for r in remarks if "=" in r)
        return {k: v for k, v in heard.items() if k in self.about and v != "default"}

    def __call__(self, told: Sequence[str], instead: Sequence[str]) -> float:
        """5 nats where the answers part."""
        return 5.0 * (self.answer(told) != self.answer(instead))


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


@dataclass
class Overwhelmed(Obedient):
    """Takes no notice of a return to the default while more than one thing else is said."""

    def answer(self, remarks: Sequence[str]) -> dict[str, str]:
        said = [r for r in remarks if "=" in r]
        clear = [r for r in said if "default" not in r]
        return super().answer(said if len(clear) <= 1 else clear)


def test_going_back_to_the_default_is_heard_beside_the_older_remark_alone() -> None:
    """Among all that stands the teacher does not notice it; what it speaks against must not stand on."""
    teacher = Overwhelmed()
    assert teacher(["end=hope", "case=upper"], ["end=hope", "case=upper", "end=default"]) == 0.0
    result = select(["end=hope", "case=upper"], ["end=default", "lovely"], teacher)
    assert result.remarks == ("case=upper",)
    assert dict(result.dropped) == {
        "end=hope": "contradicted", "end=default": "changes_nothing", "lovely": "changes_nothing",
    }  # fmt: skip


def test_a_default_of_another_kind_takes_nothing_back() -> None:
    """Nor does a teacher that follows a return to the default only here and there."""
    assert select(["end=hope", "case=upper"], ["start=default"], Overwhelmed()).remarks == ("end=hope", "case=upper")

    def half(told: Sequence[str], instead: Sequence[str]) -> float:
        """Praise beside a weak wish: some answers change, the wish is still heard in the others."""
        return {(("weak",), ("weak", "thanks")): 2.0, (("weak", "thanks"), ("thanks",)): 3.0}.get(
            (tuple(told), tuple(instead)), 0.0
        )

    assert select(["weak"], ["thanks"], half).remarks == ("weak",)


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
    assert merge(older, ["x" * 9], max_tokens=8, count_tokens=len) == older, "what never fits pushes nothing out"


def test_the_threshold_decides() -> None:
    def faint(told: Sequence[str], instead: Sequence[str]) -> float:
        return 0.3 * (tuple(told) != tuple(instead))

    assert select([], ["end=hope"], faint, eps=0.31).dropped == (("end=hope", "changes_nothing"),)
    assert select([], ["end=hope"], faint, eps=0.29).remarks == ("end=hope",)


CHATS = tuple([{"role": "user", "content": text}] for text in ("hello", "tell me all"))


def expected_change(
    base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, told: list[str], instead: list[str], limit: int
) -> float:
    """One conversation and one token at a time, without a cache."""
    peaks = []
    for chat in CHATS:
        own, read = (chat_ids(tokenizer, teacher_messages(chat, remarks)) for remarks in (told, instead))
        peak = 0.0
        for _ in range(limit):
            with torch.no_grad():
                p, q = (torch.log_softmax(base(torch.tensor([ids])).logits[0, -1].double(), -1) for ids in (own, read))
            peak = max(peak, float((q.exp() * (q - p)).sum()))
            y = int(p.argmax())
            own, read = [*own, y], [*read, y]
            if min(float(p[y]), float(q[y])) < math.log(0.02) or y == tokenizer.eos_token_id:
                break
        peaks.append(peak)
    return sum(peaks) / len(peaks)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_change_is_the_frozen_teachers_on_answers_of_its_own(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, scale: float
) -> None:
    """A trained adapter on board changes nothing; nor does the size of micro-batches, nor asking again."""
    chat_base.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        chat_base.lm_head.weight.mul_(scale)  # flat: nearly every token is implausible; sharp: few are
    want = expected_change(chat_base, tokenizer, ["one"], ["two", "one"], 6)
    assert want > 1e-3
    with attached(chat_base, LoraSpec()) as policy:
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.add_(0.1)
        for budget in (10_000, 1):
            hearing = Hearing(
                policy, tokenizer, [Probe(c, (1,)) for c in CHATS], max_new_tokens=6, micro_batch_tokens=budget
            )
            for _ in range(2):  # the second time from memory
                assert hearing.change(["one"], ["two", "one"]) == pytest.approx(want, rel=1e-3)
            assert hearing.change(["one"], ["one"]) == 0.0
        batch = token_batch([[1]], [[2]], policy.device)
        assert not torch.equal(policy.logits(batch, adapter=True), policy.logits(batch, adapter=False))
    further = expected_change(chat_base, tokenizer, ["one"], ["one", "two"], 6)
    for budget in (10_000, 1):  # with what was read before in front, and without
        probes = [Probe(c, (1,)) for c in CHATS]
        hearing = Hearing(BarePolicy(chat_base), tokenizer, probes, max_new_tokens=6, micro_batch_tokens=budget)
        assert hearing.change(["one"], ["two", "one"]) == pytest.approx(want, rel=1e-3)
        assert hearing.change(["one"], ["one", "two"]) == pytest.approx(further, rel=1e-3)
        assert hearing.change(["one"], ["one"]) == 0.0


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


NOTHING_COUNTS = 1e9
"""No effect is as large: every new remark changes nothing."""


def test_many_wordings_do_not_push_out_what_stands(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    wordings = [f"wording {n}" for n in range(5)]
    probes = [Probe(CHATS[0], (1, 2))]
    with attached(chat_base, LoraSpec()) as policy:

        def after(eps: float) -> Standing:
            stood = ["a", "b"]
            return update_standing(policy, tokenizer, stood, wordings, probes, eps=eps, max_items=2, max_new_tokens=2)

        kept = after(NOTHING_COUNTS)
        assert kept.remarks == ("a", "b")
        assert {why for _, why in kept.dropped} == {"over_the_bound", "changes_nothing"}
        assert {remark for remark, _ in kept.dropped} == set(wordings)
        newest = update_standing(
            policy, tokenizer, ["a", "b"], wordings, probes, eps=0.0, max_items=2, max_new_tokens=2
        )
        assert newest.remarks == ("wording 3", "wording 4"), "the bound holds for what stands in the end"


def test_a_conversation_beyond_the_window_is_not_judged_on(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = [{"role": "user", "content": "pear " * 40}]
    probes = [Probe(chat, (1, 2)) for chat in (long, CHATS[0])]
    with attached(chat_base, LoraSpec()) as policy:

        def judged(window: int) -> tuple[str, ...]:
            chat_base.config.max_position_embeddings = window
            found = update_standing(policy, tokenizer, ["a"], ["b"], probes, eps=NOTHING_COUNTS, max_new_tokens=2)
            return found.remarks

        fits = [len(chat_ids(tokenizer, teacher_messages(p.messages, ["a", "b"], None))) + 2 for p in probes]
        assert fits[1] < fits[0]
        assert judged(fits[0]) == judged(fits[1]) == ("a",)
        assert judged(fits[1] - 1) == ("a", "b"), "nothing to judge by: the merged list"
        hearing = Hearing(policy, tokenizer, probes, max_new_tokens=2)
        assert hearing.within(8, ["a", "b"]).probes == []
        chat_base.config.max_position_embeddings = fits[0] - 1
        assert hearing.within(8, ["a", "b"]).probes == [probes[1]]


def test_a_conversation_with_tools_is_judged_behind_the_prompt_that_training_reads(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    options = {"chat_template": "{{ tools | tojson }}{{ effort }}" + TEMPLATE, "effort": "low"}
    want = teacher_prompt(tokenizer, CHATS[0], "b", ["a"], limit=500, tools=tools, template_options=options)
    bare = teacher_prompt(tokenizer, CHATS[0], "b", ["a"], limit=500)
    assert want.ids != bare.ids
    with attached(chat_base, LoraSpec()) as policy:
        write, read = policy.write, []

        def writing(prompts: list[list[int]], limit: int) -> list[tuple[int, ...]]:
            read.extend(tuple(p) for p in prompts)
            return write(prompts, limit)

        monkeypatch.setattr(policy, "write", writing)
        probe = Probe(CHATS[0], (1, 2), tools, options)
        update_standing(policy, tokenizer, ["a"], ["b"], [probe], eps=0.0, max_new_tokens=2)
    assert want.ids in read
    assert bare.ids not in read
