"""What of a job depends on its lease and the frozen base alone: the answers that the teacher writes, its scores, the
base's. Computed before an adapter is attached, and for several leases together where there are several.

Whom a lease shared the pass with does not change what it is given, but for rounding: rows of one matrix product may
round differently in another one's company. On the CPUs tried they did not (docs/speed.md); nobody promises it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from api_schemas.worker import Lease
from sdpo_core.ahead import anchor_scores, teacher_targets
from sdpo_core.bare import BarePolicy
from sdpo_core.identity import AnchorScore, TeacherTarget
from sdpo_core.options import Options
from sdpo_core.ranks import any_rank
from sdpo_core.rollouts import learnt_from, learnt_together
from sdpo_core.samples import Sample
from worker.base_model import BaseModel
from worker.errors import StoppedError
from worker.items import samples_of
from worker.mapping import options_of
from worker.messages import Progress
from worker.ranks import common_plan

K = TypeVar("K", bound=Hashable)
Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Draft:
    """A lease as far as it is known without the model."""

    lease: Lease
    samples: list[Sample]
    """One per item."""
    options: Options


def draft_of(lease: Lease, base: BaseModel) -> Draft:
    """Raises as `samples_of` and `options_of` do."""
    samples = samples_of(lease, base)
    return Draft(lease, samples, common_plan(options_of(lease.training), base, samples, lease))


@dataclass(frozen=True)
class Ahead:
    """What the training loop is given. Where a list is None, the loop scores by itself."""

    learnt: list[Sample]
    """What is learnt from: entry i for item i, and what the teacher wrote beside them."""
    options: Options
    """Planned for these."""
    targets: list[TeacherTarget] | None
    anchors: list[AnchorScore] | None
    seconds: float
    """What it took, an equal share where several leases took it together."""


def ahead_of(
    drafts: Sequence[Draft], base: BaseModel, tell: Tell, should_stop: Callable[[], bool] = lambda: False
) -> list[Ahead]:
    """One for each. `should_stop`: of all of them. Raises StoppedError, and as the library does for the first draft
    that it cannot take: then ask for each alone."""
    began = time.monotonic()
    policy = base.bare()
    drafts = _written(drafts, policy, base, tell, should_stop)
    if any_rank(base.ranks, should_stop()):
        raise StoppedError
    for draft in drafts:
        _say(draft, "scoring", tell)
    targets: list[list[TeacherTarget] | None] = [None] * len(drafts)
    anchors: list[list[AnchorScore] | None] = [None] * len(drafts)
    if base.ranks.size == 1:  # several share that work in the training loop
        targets = _scored(drafts, lambda d: _target_kind(d.options), lambda s, o: teacher_targets(policy, s, o))
        anchors = _scored(drafts, lambda d: _anchor_kind(d.options), lambda s, o: anchor_scores(policy, s, o))
    share = (time.monotonic() - began) / len(drafts)
    return [Ahead(d.samples, d.options, targets[i], anchors[i], share) for i, d in enumerate(drafts)]


def _written(
    drafts: Sequence[Draft], policy: BarePolicy, base: BaseModel, tell: Tell, should_stop: Callable[[], bool]
) -> list[Draft]:
    """The drafts with what is learnt from in place of the items' own answers, planned anew: answers that the teacher
    wrote may be more and longer."""
    done = list(drafts)
    for kind, rows in _alike(drafts, lambda d: d.lease.training.rollouts).items():
        if kind == "own":
            continue

        def told(_: int = 0, rows: Sequence[int] = rows) -> None:
            for row in rows:
                _say(drafts[row], "answering", tell)

        told()
        batches, tokens = [drafts[r].samples for r in rows], min(drafts[r].options.micro_batch_tokens for r in rows)
        common: dict[str, Any] = {"batch_tokens": tokens, "should_stop": should_stop, "on_written": told}
        if len(batches) == 1:
            learnt = [learnt_from(policy, batches[0], kind, ranks=base.ranks, **common)]
        else:
            learnt = learnt_together(policy, batches, kind, **common)
        for row, samples in zip(rows, learnt, strict=True):
            draft = drafts[row]
            options = common_plan(draft.options, base, samples, draft.lease)
            done[row] = replace(draft, samples=samples, options=options)
    return done


def _scored(
    drafts: Sequence[Draft],
    kind_of: Callable[[Draft], Hashable | None],
    score: Callable[[list[Sample], Options], list[K]],
) -> list[list[K] | None]:
    """Of each draft's samples, those of one kind in one pass; None for drafts of no kind."""
    found: list[list[K] | None] = [None] * len(drafts)
    for kind, rows in _alike(drafts, kind_of).items():
        if kind is None:
            continue
        together = [s for r in rows for s in drafts[r].samples]
        tokens = min(drafts[r].options.micro_batch_tokens for r in rows)
        scores = iter(score(together, drafts[rows[0]].options.replace(micro_batch_tokens=tokens)))
        for row in rows:
            found[row] = [next(scores) for _ in drafts[row].samples]
    return found


def _target_kind(options: Options) -> Hashable | None:
    """Options with the same have the same teacher, of whom the same is kept. None: it is not the base alone, or both
    paths are to be compared while they run."""
    if options.teacher != "base" or options.teacher_mix > 0 or options.audit:
        return None
    return options.divergence, options.skip_tokens, options.path, options.chunk_tokens


def _anchor_kind(options: Options) -> Hashable | None:
    return (
        None if options.audit or not options.needs_base else (options.skip_tokens, options.path, options.chunk_tokens)
    )


def _alike(drafts: Sequence[Draft], kind_of: Callable[[Draft], K]) -> dict[K, list[int]]:
    """Rows by kind, both in order."""
    rows: dict[K, list[int]] = {}
    for row, draft in enumerate(drafts):
        rows.setdefault(kind_of(draft), []).append(row)
    return rows


def _say(draft: Draft, phase: str, tell: Tell) -> None:
    tell(Progress(run_id=draft.lease.run_id, phase=phase, steps=draft.options.steps))
