"""The teacher scored ahead of the batch: off the critical path, as soon as the feedback is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_core.divergence import Target
from sdpo_core.ema import EmaTeacher
from sdpo_core.errors import OptionError, SampleError
from sdpo_core.options import Options
from sdpo_core.path_choice import choose
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample


def teacher_targets(
    policy: Policy, samples: Sequence[Sample], options: Options, *, ema: EmaTeacher | None = None
) -> list[Target]:
    """What `train_batch` would score of the teacher, ahead of it; dead samples have empty targets.

    Valid for as long as the teacher is the same: a bare base always is. Raises OptionError for teacher `live`.
    """
    if options.teacher == "live":
        raise OptionError("teacher", "'live' is the student of each step: it cannot be scored ahead")
    route = choose(policy, options, ema)
    live = [s for s in samples if s.live]
    found = iter(route.within_memory(lambda path: path.targets(live), live) if live else [])
    return [next(found) if s.live else Target(torch.empty(0, device=policy.device)) for s in samples]


def live_targets(samples: Sequence[Sample], targets: Sequence[Target] | None, options: Options) -> list[Target]:
    """The given targets of the live samples, checked; none for none. Raises OptionError, SampleError."""
    if targets is None:
        return []
    if options.teacher == "live":
        raise OptionError("teacher", "'live' is the student of each step: it cannot be scored ahead")
    if len(targets) != len(samples):
        raise SampleError(f"{len(targets)} targets for {len(samples)} samples")
    known = [(t, s) for t, s in zip(targets, samples, strict=True) if s.live]
    for target, sample in known:
        if len(target.logp) != len(sample.response_ids):
            raise SampleError(f"a target of {len(target.logp)} tokens for a response of {len(sample.response_ids)}")
    return [target for target, _ in known]
