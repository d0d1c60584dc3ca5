"""The teacher scored ahead of the batch: off the critical path, as soon as the feedback is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sdpo_core.batch_checks import taught_parts
from sdpo_core.divergence import Target
from sdpo_core.ema import EmaTeacher
from sdpo_core.errors import OptionError, TargetError
from sdpo_core.identity import TeacherTarget, check_key, target_keys
from sdpo_core.options import Options
from sdpo_core.path_choice import choose
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample


def teacher_targets(
    policy: Policy, samples: Sequence[Sample], options: Options, *, ema: EmaTeacher | None = None
) -> list[TeacherTarget]:
    """What `train_batch` would score of the teacher, ahead of it, one per sample; dead samples have empty targets.

    Each knows what it was scored for, so lists can be joined and cut as their samples are. Valid for as long as the
    teacher is the same: a bare base always is. Raises OptionError for teacher `live` and as `train_batch` does,
    ContextTooLong and SampleError for samples that the model cannot read.
    """
    samples = taught_parts(policy, samples, options)
    _refuse_live(options)
    route = choose(policy, options, ema)
    live = [s for s in samples if s.live]
    found = iter(route.within_memory(lambda path: path.targets(live), live) if live else [])
    keys = target_keys(policy, samples, options, ema)
    empty = torch.empty(0, device=policy.device)
    return [TeacherTarget(next(found) if s.live else Target(empty), k) for s, k in zip(samples, keys, strict=True)]


def live_targets(
    policy: Policy,
    samples: Sequence[Sample],
    targets: Sequence[TeacherTarget] | None,
    options: Options,
    ema: EmaTeacher | None,
) -> list[Target]:
    """The given targets of the live samples, checked; none for none. Raises OptionError, TargetError."""
    if targets is None:
        return []
    _refuse_live(options)
    targets = _listed(targets)
    if len(targets) != len(samples):
        raise TargetError(f"{len(targets)} targets for {len(samples)} samples")
    known = []
    keys = target_keys(policy, samples, options, ema)
    for row, (sample, found, wanted) in enumerate(zip(samples, targets, keys, strict=True)):
        if not sample.live:
            continue
        if not isinstance(found, TeacherTarget):
            raise TargetError(f"the target of sample {row} is a {type(found).__name__}: give what teacher_targets gave")
        check_key(row, found.key, wanted)
        known.append(found.target)
    return known


def _listed(targets: Iterable[TeacherTarget]) -> list[TeacherTarget]:
    try:
        return list(targets)
    except TypeError as error:
        raise TargetError("targets are a list of TeacherTarget: give what teacher_targets gave") from error


def _refuse_live(options: Options) -> None:
    if options.teacher == "live":
        raise OptionError("teacher", "'live' is the student of each step: it cannot be scored ahead")
