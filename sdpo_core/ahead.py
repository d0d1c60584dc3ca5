"""Teacher and base scored ahead of the batch: off the critical path, as soon as the feedback is there; on a
`BarePolicy` without an adapter, and for the samples of several batches together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sdpo_core.batch_checks import taught_parts
from sdpo_core.divergence import Target
from sdpo_core.ema import EmaTeacher
from sdpo_core.errors import OptionError, TargetError
from sdpo_core.identity import AnchorScore, TeacherTarget, anchor_keys, check_key, target_keys
from sdpo_core.options import Options
from sdpo_core.path_choice import choose
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample
from sdpo_core.scoring import BaseScore


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
    found = iter(route.tried(lambda path: path.targets(live), live) if live else [])
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


def anchor_scores(policy: Policy, samples: Sequence[Sample], options: Options) -> list[AnchorScore]:
    """What `train_batch` would score of the base on the plain prompts (`Options.needs_base`), ahead of it: one per
    sample, valid for as long as the base is the same. Raises as `teacher_targets`."""
    samples = taught_parts(policy, samples, options)
    route = choose(policy, options.replace(teacher="base", teacher_mix=0.0), None)
    live = [s for s in samples if s.live]
    found = iter(route.tried(lambda path: path.base(live), live) if live else [])
    empty = torch.empty(0, device=policy.device)
    nothing = BaseScore(empty, Target(empty))
    keys = anchor_keys(policy, samples)
    return [AnchorScore(next(found) if s.live else nothing, key) for s, key in zip(samples, keys, strict=True)]


def live_anchors(
    policy: Policy, samples: Sequence[Sample], anchors: Sequence[AnchorScore] | None
) -> list[BaseScore] | None:
    """The given scores of the live samples, checked; None for none. Raises TargetError."""
    if anchors is None:
        return None
    if len(anchors) != len(samples):
        raise TargetError(f"{len(anchors)} anchors for {len(samples)} samples")
    known = []
    for row, (sample, found, wanted) in enumerate(zip(samples, anchors, anchor_keys(policy, samples), strict=True)):
        if sample.live:
            check_key(row, found.key, wanted, "anchor_scores")
            known.append(found.score)
    return known


def _listed(targets: Iterable[TeacherTarget]) -> list[TeacherTarget]:
    try:
        return list(targets)
    except TypeError as error:
        raise TargetError("targets are a list of TeacherTarget: give what teacher_targets gave") from error


def _refuse_live(options: Options) -> None:
    if options.teacher == "live":
        raise OptionError("teacher", "'live' is the student of each step: it cannot be scored ahead")
