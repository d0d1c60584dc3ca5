"""Who writes the answers that a batch learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import LoraSpec, Options, Sample, attached, learnt_from, make_optimizer, train_batch
from sdpo_core.lora import LoraPolicy
from sdpo_core.rollouts import MARGIN
from sdpo_core.writing import Writer

END = 9
LONG, SHORT = (20, 21, 22, 23, 24, 25), (30, 31)


class Scribe:
    """A teacher that answers each prompt with its own tokens backwards, and ends where there is room."""

    def __init__(self, memory: int = 10_000, endless: Sequence[int] = ()) -> None:
        self.memory, self.endless = memory, endless
        self.groups: list[int] = []
        self.limit = 0
        self.ends = frozenset({END})

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, should_stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, ...]]:
        self.groups.append(len(prompts))
        self.limit = max_new_tokens
        if len(prompts) * max(map(len, prompts)) > self.memory:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        stopped = should_stop is not None and should_stop()
        return [(1,) if stopped else self._answer(p)[:max_new_tokens] for p in prompts]

    def _answer(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return (*reversed(prompt), *(() if prompt[0] in self.endless else (END,)))


def scribe(**known: object) -> tuple[Scribe, Writer]:
    made = Scribe(**known)  # type: ignore[arg-type]
    return made, cast(Writer, made)


def sample(told: Sequence[int], response: Sequence[int] = (5, END), *, taught: bool = True) -> Sample:
    return Sample((3, 4), tuple(response), tuple(told), (-1.0,) * len(response), taught)


BATCH = [sample(LONG), sample((40, 41), taught=False), sample(SHORT), sample((50,), ())]


def test_own_answers_are_the_batch_itself() -> None:
    seen, policy = scribe()
    assert learnt_from(policy, BATCH, "own") == BATCH
    assert seen.groups == []


def test_the_teachers_answers_take_the_place_of_live_ones_alone() -> None:
    seen, policy = scribe()
    learnt = learnt_from(policy, BATCH, "teacher")
    assert [s.response_ids for s in learnt] == [(*reversed(LONG), END), (5, END), (*reversed(SHORT), END), ()]
    assert [s.teacher_written for s in learnt] == [True, False, True, False]
    assert [(s.prompt_ids, s.teacher_prompt_ids) for s in learnt] == [
        (s.prompt_ids, s.teacher_prompt_ids) for s in BATCH
    ]
    assert seen.groups == [2], "nothing is written for what teaches nothing"


def test_both_is_the_batch_with_the_teachers_answers_behind_it() -> None:
    _, policy = scribe()
    learnt = learnt_from(policy, BATCH, "both")
    assert learnt[: len(BATCH)] == BATCH
    assert [s.response_ids for s in learnt[len(BATCH) :]] == [(*reversed(LONG), END), (*reversed(SHORT), END)]


@pytest.mark.parametrize("endless", [(), (LONG[0],)])
def test_an_answer_without_an_end_is_not_learnt(endless: Sequence[int]) -> None:
    """Whether it ran into the limit or stopped for another reason."""
    _, policy = scribe(endless=endless)
    limit = len(LONG) if not endless else None
    learnt = learnt_from(policy, BATCH, "teacher", max_new_tokens=limit)
    assert learnt[0] == BATCH[0], "the student's own stays"
    assert learnt[2].teacher_written
    assert len(learnt_from(policy, BATCH, "both", max_new_tokens=limit)) == len(BATCH) + 1


def test_room_for_an_answer_goes_by_the_longest_live_one() -> None:
    seen, policy = scribe()
    learnt_from(policy, [sample(LONG, (5,) * 7), sample(SHORT, (5,) * 50, taught=False)], "both")
    assert seen.limit == 2 * 7 + MARGIN


def test_what_is_decoded_together_is_bounded_and_halved_when_memory_runs_out() -> None:
    batch = [sample(LONG) for _ in range(8)]
    seen, policy = scribe(memory=len(LONG) * 3)
    heard: list[int] = []
    learnt = learnt_from(
        policy, batch, "teacher", batch_tokens=6 * (len(LONG) + 20), max_new_tokens=20, on_written=heard.append
    )
    assert seen.groups == [6, 3, 3, 2]
    assert heard == [3, 6, 8]
    assert all(s.response_ids == (*reversed(LONG), END) for s in learnt)
    _, hopeless = scribe(memory=1)
    with pytest.raises(RuntimeError, match="allocate memory"):
        learnt_from(hopeless, batch, "both")


def test_a_stop_leaves_the_rest_unwritten() -> None:
    seen, policy = scribe()
    batch = [sample(LONG), sample(SHORT), sample((60, 61))]
    tokens = len(LONG) + 20
    heard: list[int] = []

    def stop() -> bool:
        return heard == [1]

    learnt = learnt_from(
        policy, batch, "teacher", batch_tokens=tokens, max_new_tokens=20, should_stop=stop, on_written=heard.append
    )
    assert [s.teacher_written for s in learnt] == [True, False, False]
    assert seen.groups == [1]
    assert learnt_from(policy, batch, "both", should_stop=lambda: True) == batch


@pytest.fixture
def written_by_a_model(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[LoraPolicy, list[Sample]]]:
    """A model, and samples whose told answers end within four tokens."""
    told = tuple(tokenizer.encode("in a word"))
    with attached(chat_base, LoraSpec()) as policy:
        chat_base.generation_config.eos_token_id = None
        (free,) = policy.write([told], 3)
        chat_base.generation_config.eos_token_id = free[-1]
        yield policy, [Sample((8, 7), (5, 6), told, (-1.0, -2.0)), Sample((8,), (5,), told, taught=False)]


def test_a_model_stops_writing_at_the_token_at_which_it_is_told_to(
    chat_base: Qwen3ForCausalLM, written_by_a_model: tuple[LoraPolicy, list[Sample]]
) -> None:
    policy, samples = written_by_a_model
    chat_base.generation_config.eos_token_id = None
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) >= 3

    (answer,) = policy.write([samples[0].teacher_prompt_ids], 20, stop)
    assert len(answer) == 3


def test_training_counts_what_the_teacher_wrote(written_by_a_model: tuple[LoraPolicy, list[Sample]]) -> None:
    policy, samples = written_by_a_model
    options = Options(steps=2, learning_rate=1e-3, stop_gap=0.0)
    optimizer = make_optimizer(policy, options)
    for rollouts, written, live in (("own", 0, 1), ("teacher", 1, 1), ("both", 1, 2)):
        learnt = learnt_from(policy, samples, rollouts)  # type: ignore[arg-type]
        result = train_batch(policy, optimizer, learnt, options)
        assert [s.teacher_written for s in result.steps] == [written, written]
        assert sum(s.taught for s in result.samples) == live
        assert result.samples[1].taught is False
