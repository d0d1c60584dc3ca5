# ruff: noqa: N815 - shape suffixes on fields
"""One answer to learn from, and padding of several into tensors.

Shape legend: B samples, N tokens of prompt and response, T response tokens. Padding is on the right, where a causal
model's earlier positions cannot see it; `TokenBatch.mask` says which response positions are real.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from sdpo_core.errors import SampleError

_ROUNDING = 1e-3
"""A log-prob of certainty may be above 0 by so much."""


@dataclass(frozen=True)
class Sample:
    """A rollout and what the teacher is told about it. Token ids are the engine's own, never re-tokenised.

    Lists, arrays and tensors of whole numbers are taken as well. Raises SampleError.
    """

    prompt_ids: tuple[int, ...]
    """What the student sees before the response; at least one token."""
    response_ids: tuple[int, ...]
    """The answer, end-of-turn token included where the engine produced one. Empty: the sample teaches nothing."""
    teacher_prompt_ids: tuple[int, ...]
    """The same conversation with the feedback in it; the SAME response ids follow."""
    behaviour_logprobs: tuple[float, ...] | None = None
    """Log-probs of the response under the policy that wrote it, one per response token, in nats, 0 at most (an engine's
    rounding, 1e-3, is let pass); None = unknown."""
    taught: bool = True
    """False: there is no usable feedback, the sample is counted and teaches nothing."""
    teacher_written: bool = False
    """The teacher wrote the response (SDFT): the ratio is 1 throughout, for the student never sampled it."""
    reward_advantage: float = 0.0
    """A reward's advantage for the whole answer; used by `PolicyGradient.reward_weight` only."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "response_ids", "teacher_prompt_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        if not self.prompt_ids or not self.teacher_prompt_ids:
            raise SampleError("a prompt needs at least one token before the response")
        if not math.isfinite(_number("reward_advantage", self.reward_advantage)):
            raise SampleError("reward_advantage is not finite")
        if self.behaviour_logprobs is None:
            return
        object.__setattr__(self, "behaviour_logprobs", _log_probs(self.behaviour_logprobs))
        if self.teacher_written:
            raise SampleError("an answer that the teacher wrote has no log-probs under the student: leave them out")
        given, needed = len(self.behaviour_logprobs), len(self.response_ids)
        if given != needed:
            raise SampleError(f"{given} behaviour log-probs for a response of {needed} tokens")
        if not all(math.isfinite(x) for x in self.behaviour_logprobs):
            raise SampleError("a behaviour log-prob is not finite; give None for the sample if one is missing")
        if max(self.behaviour_logprobs, default=0.0) > _ROUNDING:
            raise SampleError("a behaviour log-prob is above 0: give natural logarithms of probabilities")

    @property
    def live(self) -> bool:
        """Whether the sample teaches anything."""
        return self.taught and len(self.response_ids) > 0

    @property
    def student_length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def teacher_length(self) -> int:
        return len(self.teacher_prompt_ids) + len(self.response_ids)

    def without_first(self, tokens: int) -> Sample:
        """The same answer whose first tokens teach nothing: they stand at the end of both prompts."""
        if tokens == 0:
            return self
        given, known = self.response_ids[:tokens], self.behaviour_logprobs
        return replace(
            self,
            prompt_ids=self.prompt_ids + given,
            response_ids=self.response_ids[tokens:],
            teacher_prompt_ids=self.teacher_prompt_ids + given,
            behaviour_logprobs=None if known is None else known[tokens:],
        )


def _token_ids(name: str, given: Iterable[Any]) -> tuple[int, ...]:
    """Raises SampleError for what is no row of whole numbers from 0."""
    try:
        ids = tuple(map(index, given))
    except TypeError as error:
        raise SampleError(f"{name} must be a row of token ids, whole numbers: {error}") from error
    if min(ids, default=0) < 0:
        raise SampleError(f"{name} holds {min(ids)}: token ids count from 0", code="unknown_token")
    return ids


def _log_probs(given: Iterable[Any]) -> tuple[float, ...]:
    try:
        return tuple(_number("a behaviour log-prob", x) for x in given)
    except TypeError as error:
        raise SampleError(f"behaviour_logprobs must be a row of numbers: {error}") from error


def _number(name: str, given: Any) -> float:
    if given is None or isinstance(given, str | bytes):
        raise SampleError(f"{name} is {given!r}, no number; give None for the sample if log-probs are missing")
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of many
        raise SampleError(f"{name} is no number: {error}") from error


@dataclass(frozen=True)
class TokenBatch:
    """Several sequences, right-padded."""

    ids_BN: Tensor
    attention_BN: Tensor
    """1 on real tokens, 0 on padding."""
    starts_B: tuple[int, ...]
    """Index of each row's first response token."""
    lengths_B: tuple[int, ...]
    """Response tokens of each row."""

    @property
    def first_logit(self) -> int:
        """Lowest position whose logits predict a response token."""
        return min(self.starts_B) - 1

    def positions(self) -> Tensor:
        """(B, T): positions of the logits that predict each response token; padding points at a real position."""
        longest = max(self.lengths_B)
        starts_B1 = torch.tensor(self.starts_B, device=self.ids_BN.device).unsqueeze(1)
        steps_T = torch.arange(longest, device=self.ids_BN.device)
        return (starts_B1 - 1 + steps_T).clamp(max=self.ids_BN.shape[1] - 1)

    def mask(self) -> Tensor:
        """(B, T): true on real response tokens."""
        lengths_B1 = torch.tensor(self.lengths_B, device=self.ids_BN.device).unsqueeze(1)
        return torch.arange(max(self.lengths_B), device=self.ids_BN.device) < lengths_B1


def token_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> TokenBatch:
    """Join each prompt with its response and pad on the right (with token 0, which nothing attends to)."""
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    longest = max(len(row) for row in rows)
    ids_BN = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    attention_BN = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    starts = tuple(len(p) for p in prompts)
    return TokenBatch(ids_BN, attention_BN, starts, tuple(len(r) for r in responses))


def pad_rows(rows_T: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """Stack tensors (T_b, ...) into (B, max T_b, ...), `fill` behind the end of each."""
    return torch.nn.utils.rnn.pad_sequence(list(rows_T), batch_first=True, padding_value=fill)


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut row numbers, in order, into groups whose padded size (rows x longest) is within `budget` tokens.

    A row longer than the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = length
    return groups
