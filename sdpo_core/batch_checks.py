"""What a policy can read of a batch, and what of it is taught: asked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from sdpo_core.errors import ContextTooLong, SampleError
from sdpo_core.given import a_policy, a_record, listed
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample


@runtime_checkable
class Bounded(Protocol):
    """A policy that knows what its model can read. Beyond a window some models crash and others answer nonsense."""

    @property
    def window(self) -> int | None:
        """Most tokens of one sequence; None: no bound is known."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        ...


def taught_parts(policy: Policy, samples: Sequence[Sample], options: Options) -> list[Sample]:
    """The samples as the options want them taught (`Options.skip_tokens`).

    Raises ContextTooLong and SampleError for a live sample that the model cannot read. Dead ones are never read.
    """
    a_policy(policy)
    a_record("options", options, Options)
    parts = [sample.without_first(options.skip_tokens) for sample in listed_samples(samples)]
    check_readable(policy, parts)
    return parts


def listed_samples(samples: Iterable[Sample]) -> list[Sample]:
    """They are read more than once. Raises SampleError for anything else."""
    return listed("samples", samples, Sample)


def listed_prompts(prompts: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Rows of token ids. Raises SampleError for anything else; what the ids are, a Sample says."""
    try:
        return [tuple(prompt) for prompt in prompts]
    except TypeError as error:
        raise SampleError(f"untold_prompts are rows of token ids: {error}") from error


def check_readable(policy: Policy, samples: Sequence[Sample]) -> None:
    """Raises ContextTooLong and SampleError `unknown_token`. A policy that is not `Bounded` is taken at its word."""
    if not isinstance(policy, Bounded):
        return
    for row, sample in enumerate(samples):
        if not sample.live:
            continue
        length = max(sample.student_length, sample.teacher_length)
        if policy.window is not None and length > policy.window:
            raise ContextTooLong(length, policy.window)
        largest = max(*sample.prompt_ids, *sample.teacher_prompt_ids, *sample.response_ids)
        if largest >= policy.vocabulary:
            message = f"sample {row} has token id {largest}, the model's vocabulary {policy.vocabulary} entries"
            raise SampleError(f"{message}: tokenise with the model's own tokenizer", code="unknown_token")
