"""Text that the teacher writes: greedy answers of a causal language model, decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from sdpo_core.batch_checks import listed_samples
from sdpo_core.errors import ContextTooLong
from sdpo_core.given import a_policy, whole
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample


class Writer(Policy, Protocol):
    """A policy whose bare base model can write."""

    @property
    def ends(self) -> frozenset[int]:
        """Ids of the tokens that end a turn."""
        ...

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, should_stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, ...]]:
        """The base model's greedy answers (adapter off), end-of-turn token included where one was reached.

        Raises ContextTooLong for a prompt that leaves no room in the model's window.
        """
        ...


def teacher_written(
    policy: Writer, samples: Sequence[Sample], max_new_tokens: int, should_stop: Callable[[], bool] | None = None
) -> list[Sample]:
    """For each sample one with the answer that the base model writes when told the feedback, in place of the student's.

    All of them decoded together, unfinished ones (see `Writer.ends`) too; `rollouts.learnt_from` makes a batch of them.
    Raises ContextTooLong, before anything is written, for a teacher's prompt that leaves no room for an answer in the
    model's window; SampleError for what is no list of samples, OptionError for less than one token.
    """
    samples = listed_samples(samples)
    a_policy(policy, "write")
    whole("max_new_tokens", max_new_tokens)
    if not samples:
        return []
    answers = policy.write([s.teacher_prompt_ids for s in samples], max_new_tokens, should_stop)
    return [
        Sample(s.prompt_ids, answer, s.teacher_prompt_ids, taught=s.taught, teacher_written=True)
        for s, answer in zip(samples, answers, strict=True)
    ]


def write_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    should_stop: Callable[[], bool] | None = None,
    window: int | None = None,
) -> list[tuple[int, ...]]:
    """One answer per prompt, at least one token, with the end-of-turn token where it was reached.

    `model` is a Transformers model (or a PEFT one around it); the ids that end a turn are those of its generation
    configuration. Nothing is written beyond `window`, and nothing more after the token at which `should_stop` became
    true. A prompt that leaves less room than `max_new_tokens` is decoded alone, so that it cuts no other's answer
    short; one that leaves none raises ContextTooLong, before anything is written.
    """
    rooms = [max_new_tokens if window is None else min(max_new_tokens, window - len(p)) for p in prompts]
    for prompt, room in zip(prompts, rooms, strict=True):
        if room < 1 and window is not None:
            raise ContextTooLong(len(prompt) + 1, window)
    together = [row for row, room in enumerate(rooms) if room == max_new_tokens]
    alone = [[row] for row, room in enumerate(rooms) if room < max_new_tokens]
    written: dict[int, tuple[int, ...]] = {}
    for rows in [together, *alone] if together else alone:
        answers = _decode(model, [prompts[row] for row in rows], rooms[rows[0]], should_stop)
        written |= zip(rows, answers, strict=True)
    return [written[row] for row in range(len(prompts))]


@torch.no_grad()
def _decode(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, should_stop: Callable[[], bool] | None
) -> list[tuple[int, ...]]:
    ends = ends_of(model)
    longest = max(len(p) for p in prompts)
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=0
        ),
        stopping_criteria=StoppingCriteriaList([] if should_stop is None else [_at_once(should_stop)]),
    )
    return [_cut(row, ends) for row in out[:, longest:].tolist()]


def _at_once(should_stop: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """A stopping criterion that ends every row."""

    def ended(input_ids_BN: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((input_ids_BN.shape[0],), should_stop(), device=input_ids_BN.device)

    return ended


def ends_of(model: Any) -> frozenset[int]:
    """Ids that end a turn, by the model's generation configuration."""
    given = model.generation_config.eos_token_id
    return frozenset(() if given is None else [given] if isinstance(given, int) else given)


def _cut(row: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    for i, token in enumerate(row):
        if token in ends:
            return tuple(row[: i + 1])
    return tuple(row)
