"""From leased items to samples: token ids for student and teacher, and the remarks that stay."""

from __future__ import annotations

from api_schemas.worker import Lease, LeasedItem
from sdpo_core.samples import Sample
from sdpo_core.teacher_context import teacher_messages, usable_remarks
from worker.base_model import BaseModel
from worker.errors import TrainingFailedError

MAX_STANDING = 256


def samples_of(lease: Lease, base: BaseModel) -> list[Sample]:
    return [_sample(item, lease.standing_feedback, base) for item in lease.items]


def standing_after(lease: Lease) -> list[str]:
    joined = usable_remarks([*lease.standing_feedback, *(i.feedback for i in lease.items if i.standing)])
    return joined[-MAX_STANDING:]


def _sample(item: LeasedItem, standing: list[str], base: BaseModel) -> Sample:
    prompt = item.prompt_token_ids or _chat(base, item.messages)
    response = item.response_token_ids
    logprobs = item.behaviour_logprobs
    if response is None:
        response = [*base.tokenizer.encode(item.response, add_special_tokens=False), base.tokenizer.eos_token_id]
        logprobs = None
    teacher = _chat(base, teacher_messages(item.messages, [*standing, item.feedback], item.demonstration))
    for ids in (prompt, teacher):
        if len(ids) + len(response) > base.window:
            message = f"item {item.id}: prompt of {len(ids)} and response of {len(response)} tokens"
            raise TrainingFailedError("context_too_long", f"{message} exceed {base.window}", retryable=False)
    return Sample(tuple(prompt), tuple(response), tuple(teacher), tuple(logprobs) if logprobs else None)


def _chat(base: BaseModel, messages: list[dict[str, str]]) -> list[int]:
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = base.tokenizer.encode(text, add_special_tokens=False)
    return ids
