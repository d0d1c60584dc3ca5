"""A rank's part in one batch: the rows it takes, what it scores for all, and how many micro-batches it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from sdpo_core.divergence import Target
from sdpo_core.options import Options
from sdpo_core.path_choice import Route
from sdpo_core.paths import Path
from sdpo_core.ranks import Ranks, any_rank, merged, shares
from sdpo_core.samples import Sample
from sdpo_core.scoring import BaseScore, StartScore

R = TypeVar("R")


@dataclass(frozen=True)
class SharedScorer:
    """Implements `scoring.FixedScorer`: each rank scores its rows, and all get all of them.

    In lockstep each rank scores every row instead: it would take part in the others' forward passes anyway.
    """

    route: Route
    ranks: Ranks
    live: Sequence[Sample]

    @property
    def options(self) -> Options:
        return self.route.path.options

    def base(self, samples: Sequence[Sample]) -> list[BaseScore]:
        return self._scored(samples, lambda path, own: path.base(own))

    def start(self, samples: Sequence[Sample]) -> list[StartScore]:
        return self._scored(samples, lambda path, own: path.start(own))

    def targets(self) -> list[Target]:
        return self._scored(self.live, lambda path, own: path.targets(own))

    def _scored(self, samples: Sequence[Sample], work: Callable[[Path, list[Sample]], list[R]]) -> list[R]:
        rows = list(range(len(samples))) if self.ranks.lockstep else self.rows
        own = [samples[r] for r in rows]
        found = self.tried(lambda path: work(path, own), own) if own else []
        if self.ranks.lockstep:
            return found
        return merged(self.ranks, dict(zip(rows, found, strict=True)), self.route.path.policy.device)

    @cached_property
    def rows(self) -> list[int]:
        """Of this rank."""
        return shares([s.student_length for s in self.live], self.ranks.size)[self.ranks.rank]

    @property
    def own(self) -> list[Sample]:
        return [self.live[r] for r in self.rows]

    def tried(self, work: Callable[[Path], R], samples: Sequence[Sample]) -> R:
        """See `Route.tried`. In lockstep nothing is tried again: the others would not come along."""
        return work(self.route.path) if self.ranks.lockstep else self.route.tried(work, samples)

    def groups(self, path: Path) -> list[list[int]]:
        """This rank's micro-batches: row numbers of the whole batch."""
        return [[self.rows[i] for i in group] for group in path.groups(self.own)] if self.rows else []

    def fillers(self, path: Path) -> list[list[int]]:
        """Micro-batches to run for nothing, with weight 0, so that every rank in lockstep runs as many as the others:
        the shortest answer of the batch. None otherwise. Asks the other ranks."""
        if not self.ranks.lockstep:
            return []
        ours = len(self.groups(path))
        shortest = min(range(len(self.live)), key=lambda r: self.live[r].student_length)
        return [[shortest]] * (max(self.ranks.gathered(ours)) - ours)


def written_by_all(
    ranks: Ranks,
    wanted: dict[int, Sample],
    write: Callable[[list[Sample], Callable[[], bool] | None], list[Sample]],
    should_stop: Callable[[], bool] | None,
) -> dict[int, Sample]:
    """Rows with what `write` made of each, the same on every rank; those that a stop cut off are missing.

    Each rank writes some. In lockstep each writes all, for decoding is made of forward passes, and a stop is one for
    all at the same token.
    """
    if ranks.lockstep:
        rows = list(wanted)
        stop = None if should_stop is None else lambda: any_rank(ranks, should_stop())
        return dict(zip(rows, write(list(wanted.values()), stop), strict=False))
    everywhere = list(wanted)
    rows = [everywhere[i] for i in shares([s.teacher_length for s in wanted.values()], ranks.size)[ranks.rank]]
    written = write([wanted[r] for r in rows], should_stop)
    parts = ranks.gathered(dict(zip(rows, written, strict=False)))
    return dict(sorted((pair for part in parts for pair in part.items()), key=lambda pair: pair[0]))
