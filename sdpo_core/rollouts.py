"""Who writes the answers that a batch learns from: the student (SDPO), the teacher (SDFT), or both side by side.

Half-changed answers of the student are text that the teacher would never write, and what it thinks of their
continuation teaches noise; what it writes itself is right, and holds tokens that the student never samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from sdpo_core.batch_checks import check_readable, listed_samples
from sdpo_core.errors import OptionError
from sdpo_core.given import a_policy, whole
from sdpo_core.path_choice import out_of_memory, release_memory
from sdpo_core.samples import Sample, micro_batches
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
) -> list[Sample]:
    """What `train_batch` is to be given: entry i is for samples[i], and with `both` the teacher's answers follow.

    The bare base model, told the feedback, writes for live samples alone. `max_new_tokens`: of one answer; None =
    twice the longest of the student's answers and `MARGIN`, for an answer as wished may well be longer. One that did
    not reach its end is not learnt: with `teacher` the student's own stays in its place. `batch_tokens`: rows times
    longest prompt and answer of what is decoded together, one answer at least; half as many after a lack of memory.
    `on_written` hears after each group how many are done. Once `should_stop` is true, asked at each token, nothing
    more is written. Raises OptionError for another name and numbers below 1, ContextTooLong and SampleError for
    samples that the model cannot read.
    """
    a_policy(policy, "write")
    whole("batch_tokens", batch_tokens)
    if max_new_tokens is not None:
        whole("max_new_tokens", max_new_tokens)
    if rollouts not in get_args(Rollouts):
        raise OptionError("rollouts", f"must be one of {', '.join(get_args(Rollouts))}")
    samples = listed_samples(samples)
    check_readable(policy, samples)
    live = [i for i, sample in enumerate(samples) if sample.live]
    if rollouts == "own" or not live:
        return list(samples)
    limit = max_new_tokens or 2 * max(len(samples[i].response_ids) for i in live) + MARGIN
    groups = _Groups(policy, limit, batch_tokens, should_stop, on_written)
    written = groups.write([samples[i] for i in live])
    ended = {i: s for i, s in zip(live, written, strict=False) if s.response_ids[-1] in policy.ends}
    if rollouts == "both":
        return [*samples, *ended.values()]
    return [ended.get(i, sample) for i, sample in enumerate(samples)]


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
