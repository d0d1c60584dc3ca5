"""Which log-probs an answer was really drawn with.

The importance ratio divides by the policy that drew the answer. An engine's raw log-probs are that policy only at
temperature 1 without filters and penalties; processed ones are it at any sampling, but not at temperature 0, where
one token had probability 1 and the values still speak of the model. (A grammar, as response_format or a forced tool
call sets one, is in vLLM's raw values too: measured.) Where the values are not the policy:

* the parent answered: its log-probs at temperature 1 are computed anew, which the training loop does by itself;
* another version answered: its raw values are used as a reference, for nothing nearer to it can be had without loading
  it. The ratio then compares the student with that version, and not with how its answer was drawn.

Either is reported, item by item.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from api_schemas.worker import Lease, LeasedItem

Behaviour = Literal["engine", "recomputed", "reference"]
GREEDY_BELOW = 1e-5
"""vLLM's: temperatures below it are greedy."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (None,),
    "thinking_token_budget": (None, -1),
}
"""Values that leave the model's own distribution as it is. What is not in a request's sampling is neutral."""


def behaviour_of(item: LeasedItem, lease: Lease) -> Behaviour:
    """What is to be done about this item's behaviour log-probs."""
    if item.behaviour_logprobs is None or item.logprobs_mode is None:
        return "recomputed"
    if is_policy(item.logprobs_mode, item.sampling):
        return "engine"
    parent = lease.parent.version if lease.parent else 0
    if item.logprobs_mode != "raw_logprobs" or item.version == parent:
        return "recomputed"
    return "reference"


def is_policy(mode: str, sampling: Mapping[str, Any]) -> bool:
    """Whether values of this mode are the log-probs of the policy that drew an answer with this sampling."""
    if float(sampling.get("temperature", 1.0)) < GREEDY_BELOW:
        return False
    if mode == "processed_logprobs":
        return True
    return mode == "raw_logprobs" and all(sampling.get(k, values[0]) in values for k, values in NEUTRAL.items())
