"""From leased items to samples: token ids for student and teacher."""

from __future__ import annotations

import json
from typing import Any

from api_schemas.worker import Lease, LeasedItem
from sdpo_core.chat import chat_ids
from sdpo_core.errors import ContextTooLong, SampleError
from sdpo_core.hearing import Probe
from sdpo_core.samples import Sample
from sdpo_core.teacher_prompt import TeacherPrompt, teacher_prompt
from worker.base_model import BaseModel
from worker.behaviour import behaviour_of
from worker.errors import TrainingFailedError


def samples_of(lease: Lease, base: BaseModel) -> list[Sample]:
    """One sample per item, in the lease's order.

    The engine's token ids and log-probs are used as they are. Text that never had token ids is tokenised here, and its
    behaviour log-probs are left to the training loop, which takes them under the weights the batch starts from; so are
    those of answers whose values are not the policy that drew them (`worker.behaviour`). The teacher is told the
    parent's standing feedback and the item's own. Raises TrainingFailedError `context_too_long` or `bad_item`.
    """
    return [_sample(item, lease, base) for item in lease.items]


def untold_prompts(lease: Lease, base: BaseModel, samples: list[Sample]) -> list[tuple[int, ...]]:
    """Per item what the teacher reads without this item's own feedback: the conversation and what else stands."""
    found = []
    for item, sample in zip(lease.items, samples, strict=True):
        others = [r for r in lease.standing_feedback if r.strip() != item.feedback.strip()]
        quiet = item.model_copy(update={"feedback": "", "demonstration": None})
        found.append(_teacher(quiet, others, base, len(sample.response_ids)).ids)
    return found


def probes_of(lease: Lease, samples: list[Sample]) -> list[Probe]:
    """The batch's answers, as material for judging which remarks stand, behind the prompts that training reads."""
    return [
        Probe(template_messages(item), sample.response_ids, item.tools, template_options(item))
        for item, sample in zip(lease.items, samples, strict=True)
    ]


def template_messages(item: LeasedItem) -> list[dict[str, Any]]:
    """The conversation as the engine gives it to the chat template: arguments of tool calls are objects, not text."""
    return [_for_template(message) for message in item.messages]


def template_options(item: LeasedItem) -> dict[str, Any]:
    """What else the engine told the template: vLLM derives both from `reasoning_effort`."""
    effort = item.sampling.get("reasoning_effort")
    return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if (thought := made.get("reasoning")) is not None:
        made["reasoning_content"] = thought  # templates know it by either name
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [call | {"function": _parsed_arguments(call["function"])} for call in calls]
    return made


def _parsed_arguments(function: dict[str, Any]) -> dict[str, Any]:
    try:
        return function | {"arguments": json.loads(function.get("arguments") or "{}")}
    except ValueError:  # the model wrote no JSON: as it stands
        return function


def _sample(item: LeasedItem, lease: Lease, base: BaseModel) -> Sample:
    try:
        response, logprobs = _response(item, lease, base.tokenizer)
        prompt = item.prompt_token_ids
        if prompt is None:
            prompt = chat_ids(
                base.tokenizer, template_messages(item), tools=item.tools, template_options=template_options(item)
            )
        if len(prompt) + len(response) > base.window:
            raise _too_long(item, "prompt", len(prompt), len(response), base.window)
        teacher = _teacher(item, lease.standing_feedback, base, len(response))
        return Sample(
            prompt_ids=tuple(prompt),
            response_ids=tuple(response),
            teacher_prompt_ids=teacher.ids,
            behaviour_logprobs=None if logprobs is None else tuple(logprobs),
            taught=teacher.taught,
        )
    except SampleError as error:
        raise TrainingFailedError("bad_item", f"item {item.id}: {error}", retryable=False) from error


def _response(item: LeasedItem, lease: Lease, tokenizer: Any) -> tuple[list[int], list[float] | None]:
    """The answer's token ids and its behaviour log-probs. Control tokens written out in a text stay text."""
    if item.response_token_ids is not None:
        known = behaviour_of(item, lease) != "recomputed"
        return item.response_token_ids, item.behaviour_logprobs if known else None
    ids = tokenizer.encode(item.response, add_special_tokens=False, split_special_tokens=True)
    return [*ids, tokenizer.eos_token_id], None


def _teacher(item: LeasedItem, standing: list[str], base: BaseModel, response_length: int) -> TeacherPrompt:
    try:
        return teacher_prompt(
            base.tokenizer,
            template_messages(item),
            item.feedback,
            standing,
            limit=base.window - response_length,
            demonstration=item.demonstration,
            tools=item.tools,
            template_options=template_options(item),
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
