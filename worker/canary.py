"""What engines are held to: log-probs of fixed tokens under the new version, recorded where it was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from api_schemas.worker import Canary
from sdpo_core.chat import chat_ids
from sdpo_core.policy import Policy, response_logits
from sdpo_core.samples import token_batch
from worker.base_model import BaseModel
from worker.errors import TrainingFailedError

CONTINUATION = 8
"""Tokens of the base model's own answer that are scored besides the prompt."""


@torch.no_grad()
def canary_ids(base: BaseModel, prompt: str | None) -> list[int]:
    """The prompt in the model's chat template and what the base says next, greedily. Call with no adapter attached.

    Empty when there is no prompt, or it does not fit into the model's window. Remembered: the base is frozen.
    """
    if prompt and prompt in base.canaries:
        return list(base.canaries[prompt])
    ids = chat_ids(base.tokenizer, [{"role": "user", "content": prompt}]) if prompt else []
    if not ids or len(ids) + CONTINUATION > base.window:
        return []
    for _ in range(CONTINUATION):
        output: Any = base.module(input_ids=torch.tensor([ids], device=base.device), use_cache=False, logits_to_keep=1)
        ids.append(int(output.logits[0, -1].argmax()))
    assert prompt  # noqa: S101 - there are ids
    base.canaries[prompt] = tuple(ids)
    return ids


@torch.no_grad()
def score(policy: Policy, ids: Sequence[int]) -> list[float]:
    """Raw log-prob of every token but the first, adapter on. Raises TrainingFailedError if one is not finite."""
    if not ids:
        return []
    batch = token_batch([ids[:1]], [ids[1:]], policy.device)
    logprobs_TV = response_logits(policy, batch, adapter=True)[0].float().log_softmax(-1)
    chosen: list[float] = logprobs_TV.gather(-1, torch.tensor(ids[1:], device=policy.device)[:, None])[:, 0].tolist()
    if not all(map(math.isfinite, chosen)):
        message = "the adapter's log-probs are not finite: lower the learning rate"
        raise TrainingFailedError("diverged", message, retryable=False)
    return chosen


def record(base: BaseModel, ids: list[int], before: list[float], after: list[float]) -> Canary | None:
    """`before` and `after` training: scores of `ids`. None without ids."""
    kind = next(base.module.parameters()).dtype
    dtype: Literal["float32", "bfloat16"] = "float32" if kind is torch.float32 else "bfloat16"
    return Canary(token_ids=ids, logprobs=after, parent_logprobs=before, dtype=dtype) if ids else None
