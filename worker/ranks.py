"""Several training processes on one lease: who does what, and that they agree.

All of them get the lease from the supervisor and follow the same job. They share what a batch costs: the teacher's
answers, scoring, forward and backward. The first rank alone speaks to the supervisor about steps, judges the standing
remarks and writes the version, unless the base is sharded: then the others take part in its forward passes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from api_schemas.worker import Lease
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.ranks import LONE, Ranks, from_first
from sdpo_core.samples import Sample
from worker.base_model import BaseModel
from worker.errors import PEER_LOST, TrainingFailedError
from worker.plan import planned


def follows(ranks: Ranks) -> bool:
    """Whether this rank has no part in what the first one does by itself."""
    return ranks.rank > 0 and not ranks.lockstep


def common_plan(options: Options, base: BaseModel, samples: Sequence[Sample], lease: Lease) -> Options:
    """The first rank's plan, for all. A preview is the first one's alone unless the base is sharded."""
    plan = planned(options, base, samples, lease.lora.rank)
    return plan if lease.kind == "preview" and not base.ranks.lockstep else from_first(base.ranks, plan)


def check_alike(policy: Policy, ranks: Ranks) -> None:
    """Raises TrainingFailedError where ranks do not hold the same adapter, bit for bit, after the last step."""
    if ranks.size == 1:
        return
    sha = hashlib.sha256()
    for name, parameter in policy.trainable():
        sha.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    if len(set(ranks.gathered(sha.hexdigest()))) > 1:
        raise TrainingFailedError("ranks_differ", "the ranks' adapters differ after the batch", retryable=True)


def entered(size: int, store: int | None, device: str, *, shard: bool) -> Ranks:
    """The group of this process, once all have come; on CUDA its GPU is chosen. Raises ValueError for one that is
    not there."""
    if size == 1:
        return LONE
    import torch

    from sdpo_core.process_ranks import join

    if device != "cpu" and torch.cuda.is_available():
        number = int(os.environ["LOCAL_RANK"])
        if number >= torch.cuda.device_count():
            raise ValueError(f"{size} ranks need {size} GPUs, here are {torch.cuda.device_count()}")
        torch.cuda.set_device(number)
    return join(store, lockstep=shard)


def gone() -> NoReturn:
    """Another rank is gone: end at once and say nothing. What there is to say of it, the supervisor sees itself."""
    sys.stderr.flush()
    os._exit(PEER_LOST)
