"""From leased items to samples: token ids for student and teacher."""

from __future__ import annotations

from typing import Any

from api_schemas.worker import Lease, LeasedItem
from sdpo_core.chat import chat_ids
from sdpo_core.errors import ContextTooLong, SampleError
from sdpo_core.samples import Sample
from sdpo_core.standing import Probe
from sdpo_core.teacher_prompt import TeacherPrompt, teacher_prompt
from worker.base_model import BaseModel
from worker.errors import TrainingFailedError


def samples_of(lease: Lease, base: BaseModel) -> list[Sample]:
    """One sample per item, in the lease's order.

    The engine's token ids and log-probs are used as they are. Text that never had token ids is tokenised here, and its
    behaviour log-probs are left to the training loop, which takes them under the weights the batch starts from. The
    teacher is told the parent's standing feedback and the item's own. Raises TrainingFailedError `context_too_long` or
    `bad_item`.
    """
    return [_sample(item, lease.standing_feedback, base) for item in lease.items]


def probes_of(lease: Lease, samples: list[Sample]) -> list[Probe]:
    """The batch's answers, as material for judging which remarks stand."""
    return [Probe(item.messages, sample.response_ids) for item, sample in zip(lease.items, samples, strict=True)]


def _sample(item: LeasedItem, standing: list[str], base: BaseModel) -> Sample:
    try:
        response, logprobs = _response(item, base.tokenizer)
        prompt = item.prompt_token_ids
        if prompt is None:
            prompt = chat_ids(base.tokenizer, item.messages)
        if len(prompt) + len(response) > base.window:
            raise _too_long(item, "prompt", len(prompt), len(response), base.window)
        teacher = _teacher(item, standing, base, len(response))
        return Sample(
            prompt_ids=tuple(prompt),
            response_ids=tuple(response),
            teacher_prompt_ids=teacher.ids,
            behaviour_logprobs=None if logprobs is None else tuple(logprobs),
            taught=teacher.taught,
        )
    except SampleError as error:
        raise TrainingFailedError("bad_item", f"item {item.id}: {error}", retryable=False) from error


def _response(item: LeasedItem, tokenizer: Any) -> tuple[list[int], list[float] | None]:
    """The answer's token ids and their log-probs. Control tokens written out in a text stay text."""
    if item.response_token_ids is not None:
        return item.response_token_ids, item.behaviour_logprobs
    ids = tokenizer.encode(item.response, add_special_tokens=False, split_special_tokens=True)
    return [*ids, tokenizer.eos_token_id], None


def _teacher(item: LeasedItem, standing: list[str], base: BaseModel, response_length: int) -> TeacherPrompt:
    try:
        return teacher_prompt(
            base.tokenizer,
            item.messages,
            item.feedback,
            standing,
            limit=base.window - response_length,
            demonstration=item.demonstration,
        )
    except ContextTooLong as error:
        raise _too_long(item, "prompt with its feedback", error.length, response_length, base.window) from error
    except SampleError:
        raise
    except ValueError as error:  # no user turn
        raise SampleError(str(error)) from error


def _too_long(item: LeasedItem, what: str, prompt: int, response: int, window: int) -> TrainingFailedError:
    message = (
        f"item {item.id}: the {what} has {prompt} tokens and the response {response}, together more than the model's "
        f"window of {window}: shorten the messages or the feedback"
    )
    return TrainingFailedError("context_too_long", message, retryable=False)
