"""Who writes the answers that a batch learns from: the student (SDPO), the teacher (SDFT), or both side by side.

Half-changed answers of the student are text that the teacher would never write, and what it thinks of their
continuation teaches noise; what it writes itself is right, and holds tokens that the student never samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from sdpo_core.batch_checks import check_readable, listed_samples
from sdpo_core.errors import OptionError
from sdpo_core.given import a_policy, whole
from sdpo_core.path_choice import out_of_memory, release_memory
from sdpo_core.ranks import LONE, Ranks
from sdpo_core.samples import Sample, micro_batches
from sdpo_core.sharing import written_by_all
from sdpo_core.writing import Writer, teacher_written

Rollouts = Literal["own", "teacher", "both"]
MARGIN = 64
"""Tokens that the teacher may write beyond twice the longest of the student's answers."""


def learnt_from(
    policy: Writer,
    samples: Sequence[Sample],
    rollouts: Rollouts,
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = 8192,
    should_stop: Callable[[], bool] | None = None,
    on_written: Callable[[int], None] | None = None,
    ranks: Ranks = LONE,
) -> list[Sample]:
    """What `train_batch` is to be given: entry i is for samples[i], and with `both` the teacher's answers follow.

    The bare base model, told the feedback, writes for live samples alone. `max_new_tokens`: of one answer; None =
    twice the longest of the student's answers and `MARGIN`, for an answer as wished may well be longer. One that did
    not reach its end is not learnt: with `teacher` the student's own stays in its place. `batch_tokens`: rows times
    longest prompt and answer of what is decoded together, one answer at least; half as many after a lack of memory.
    `on_written` hears after each group how many are done. Once `should_stop` is true, asked at each token, nothing
    more is written. `ranks`: several processes that share the writing; all get the same (`sharing.written_by_all`).
    Raises OptionError for another name and numbers below 1, ContextTooLong and SampleError for samples that the model
    cannot read.
    """
    a_policy(policy, "write")
    whole("batch_tokens", batch_tokens)
    if max_new_tokens is not None:
        whole("max_new_tokens", max_new_tokens)
    if rollouts not in get_args(Rollouts):
        raise OptionError("rollouts", f"must be one of {', '.join(get_args(Rollouts))}")
    batch = _Batch.of(policy, samples, max_new_tokens)
    if rollouts == "own" or not batch.live:
        return batch.samples

    def write(wanted: list[Sample], stop: Callable[[], bool] | None) -> list[Sample]:
        return _Groups(policy, batch.limit, batch_tokens, stop, on_written).write(wanted)

    written = written_by_all(ranks, dict(enumerate(batch.live)), write, should_stop)
    return batch.learnt(written, rollouts, policy.ends)


def learnt_together(
    policy: Writer,
    batches: Sequence[Sequence[Sample]],
    rollouts: Rollouts,
    *,
    batch_tokens: int = 8192,
    should_stop: Callable[[], bool] | None = None,
    on_written: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """What `learnt_from` gives for each batch, decoded together where the model's window has room for all of them."""
    known = [_Batch.of(policy, samples, None) for samples in batches]
    limit = max((b.limit for b in known), default=0)
    window = getattr(policy, "window", None)
    fits = [rollouts != "own" and (window is None or b.longest + limit <= window) for b in known]
    shared = [s for b, together in zip(known, fits, strict=True) if together for s in b.live]
    written = iter(_Groups(policy, limit, batch_tokens, should_stop, on_written).write(shared))
    return [
        b.learnt(dict(enumerate(islice(written, len(b.live)))), rollouts, policy.ends)
        if together
        else learnt_from(
            policy, b.samples, rollouts, batch_tokens=batch_tokens, should_stop=should_stop, on_written=on_written
        )
        for b, together in zip(known, fits, strict=True)
    ]


@dataclass(frozen=True)
class _Batch:
    """Samples, and how long an answer to one of them may be."""

    samples: list[Sample]
    limit: int

    @staticmethod
    def of(policy: Writer, samples: Sequence[Sample], limit: int | None) -> _Batch:
        listed = listed_samples(samples)
        check_readable(policy, listed)
        longest = max((len(s.response_ids) for s in listed if s.live), default=0)
        return _Batch(listed, limit or 2 * longest + MARGIN)

    @property
    def live(self) -> list[Sample]:
        return [s for s in self.samples if s.live]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that is answered."""
        return max((len(s.teacher_prompt_ids) for s in self.live), default=0)

    def learnt(self, written: Mapping[int, Sample], rollouts: Rollouts, ends: frozenset[int]) -> list[Sample]:
        """`written`: for some of `live`, by number. Some were given more room than `limit`."""
        rows = [i for i, sample in enumerate(self.samples) if sample.live]
        ended = {
            rows[n]: s for n, s in written.items() if len(s.response_ids) <= self.limit and s.response_ids[-1] in ends
        }
        if rollouts == "both":
            return [*self.samples, *ended.values()]
        return [ended.get(i, sample) for i, sample in enumerate(self.samples)]


class _Groups:
    """Writes a few answers at a time."""

    def __init__(
        self,
        policy: Writer,
        limit: int,
        budget: int,
        should_stop: Callable[[], bool] | None,
        on_written: Callable[[int], None] | None,
    ) -> None:
        self._policy, self._limit, self._budget = policy, limit, budget
        self._should_stop = should_stop or (lambda: False)
        self._on_written = on_written or (lambda _: None)

    def write(self, samples: list[Sample]) -> list[Sample]:
        """In order; fewer than `samples` if it was stopped."""
        done: list[Sample] = []
        while len(done) < len(samples) and not self._should_stop():
            lengths = [len(s.teacher_prompt_ids) + self._limit for s in samples[len(done) :]]
            rows = micro_batches(lengths, self._budget)[0]
            group = samples[len(done) : len(done) + len(rows)]
            if (written := self._attempt(group)) is None:
                self._budget = len(rows) * max(lengths[r] for r in rows) // 2
                release_memory()
                continue
            done += written
            self._on_written(len(done))
        return done

    def _attempt(self, group: list[Sample]) -> list[Sample] | None:
        """None: memory ran out, and there is less to try. The failed attempt's tensors are gone with its frames."""
        try:
            return teacher_written(self._policy, group, self._limit, self._should_stop)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(group) == 1:
                raise
            return None
