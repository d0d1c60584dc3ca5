"""Standing feedback: the remarks a teacher must keep hearing so that new feedback does not erase old.

A frozen teacher told only the newest remark pulls the adapter away from everything learnt before. So each version
carries a short list of remarks, oldest first, and every later batch's teacher is told it. The list must stay short
and true: repeats, praise and remarks that a newer one contradicts have to go. The teacher itself is the judge, by how
its own answers to a batch's prompts change when it is told a remark or not.

The decision (`select`) is apart from the model calls (sdpo_core.hearing), so it can be tested and replaced alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_core.chat import ChatTokenizer, chat_ids
from sdpo_core.given import a_policy, listed, number, whole
from sdpo_core.hearing import Hearing, Probe
from sdpo_core.teacher_context import usable_remarks
from sdpo_core.writing import Writer

DEFAULT_EPS = 0.5
"""A remark whose largest effect on a token, mean over answers, is below this many nats changes nothing. Measured."""

Change = Callable[[Sequence[str], Sequence[str]], float]
"""change(told, instead): how differently the teacher goes on with the answers that it writes when told `told`, if it is
told `instead`; nats (sdpo_core.hearing)."""

Why = Literal["repeated", "contradicted", "changes_nothing", "over_the_bound"]


@dataclass(frozen=True)
class Standing:
    """The remarks that stand, oldest first, and why the others do not."""

    remarks: tuple[str, ...]
    dropped: tuple[tuple[str, Why], ...] = ()


def merge(
    standing: Sequence[str],
    new: Sequence[str],
    *,
    max_items: int = 32,
    max_tokens: int = 1024,
    count_tokens: Callable[[str], int],
) -> list[str]:
    """Standing remarks and a batch's own, oldest first, without blanks and exact repeats (the newest place counts).

    The newest are kept while both bounds hold; older ones fall off. One that is longer than `max_tokens` alone can
    never stand, and pushes nothing out.
    """
    kept: list[str] = []
    tokens = 0
    for remark in reversed(usable_remarks([*standing, *new])):
        length = count_tokens(remark)
        if length > max_tokens:
            continue
        tokens += length
        if len(kept) == max_items or tokens > max_tokens:
            break
        kept.append(remark)
    return kept[::-1]


def select(standing: Sequence[str], new: Sequence[str], change: Change, *, eps: float = DEFAULT_EPS) -> Standing:
    """Which remarks stand after a batch whose own remarks are `new`, in order.

    Each new remark in turn: if the teacher, told the standing ones, does not change its answers for it, it is praise or
    a repeat and goes. If it does, older remarks that it contradicts go: those that are not heard before it but would be
    after it. What merely happens to be fulfilled without being said stays, and so does what these prompts are not
    about: for those the order does not matter. A remark that asks for what the bare model does anyway contradicts, and
    then goes as well; it is easily lost among others, so it is judged beside each older one alone too. An exact repeat
    counts at its newest place.
    """
    judge = _Judge(change, eps)
    fresh = usable_remarks(new)
    stand = [r for r in usable_remarks(standing) if r not in fresh]
    dropped: list[tuple[str, Why]] = []
    for remark in fresh:
        heard, silent = judge.differs(stand, [*stand, remark]), judge.silent(remark)
        lost = judge.contradicted(remark, stand) if heard else []
        if silent and not lost:
            lost = judge.taken_back(remark, stand)
        dropped += [(older, "contradicted") for older in lost]
        stand = [older for older in stand if older not in lost]
        if heard and not silent:
            stand.append(remark)
        else:
            dropped.append((remark, "changes_nothing" if silent else "repeated"))
    repeats = judge.repeats(stand)
    dropped += [(remark, "repeated") for remark in repeats]
    return Standing(tuple(r for r in stand if r not in repeats), tuple(dropped))


@dataclass(frozen=True)
class _Judge:
    """The questions `select` asks."""

    change: Change
    eps: float

    def differs(self, told: Sequence[str], instead: Sequence[str]) -> bool:
        return self.change(told, instead) >= self.eps

    def silent(self, remark: str) -> bool:
        """Told alone, it changes nothing on these prompts."""
        return not self.differs([], [remark])

    def contradicted(self, newest: str, stand: Sequence[str]) -> list[str]:
        """Those of `stand` that are not heard before `newest` but would be after it: where order decides, wishes
        exclude each other."""
        told = [*stand, newest]
        return [
            older
            for older in stand
            if not self.differs(told, [r for r in told if r != older])
            and self.differs(told, [*(r for r in told if r != older), older])
        ]

    def taken_back(self, newest: str, stand: Sequence[str]) -> list[str]:
        """Those of `stand` that `newest`, which changes nothing alone, contradicts when nothing else is said. What
        moves the teacher only behind another remark can only speak against that one."""
        return [
            older for older in stand if self.differs([older], [older, newest]) and self.contradicted(newest, [older])
        ]

    def repeats(self, stand: Sequence[str]) -> list[str]:
        """Newer ones of pairs that say the same: either can go unsaid, and alone they make the teacher answer alike."""
        idle = [r for r in stand if not self.differs(stand, [other for other in stand if other != r])]
        kept: list[str] = []
        for remark in idle:
            if not any(self.same(older, remark) for older in kept):
                kept.append(remark)
        return [r for r in idle if r not in kept]

    def same(self, a: str, b: str) -> bool:
        silent = self.silent(a) or self.silent(b)
        return not silent and not self.differs([a], [b]) and not self.differs([b], [a])


def update_standing(
    policy: Writer,
    tokenizer: ChatTokenizer,
    standing: Sequence[str],
    new: Sequence[str],
    probes: Sequence[Probe],
    *,
    eps: float = DEFAULT_EPS,
    max_items: int = 32,
    max_tokens: int = 1024,
    max_probes: int = 8,
    max_new_tokens: int = 128,
) -> Standing:
    """The remarks that stand after a batch whose own remarks are `new` and whose rollouts are `probes`.

    At most `max_probes` of the probes, evenly spread, are judged on, and of the teacher's answers to them the first
    `max_new_tokens`. A probe that with all remarks and such an answer is beyond the model's window is passed over.
    Without probes nothing can be judged: the merged list stands. The bounds hold for the batch's own remarks, before
    they are judged, and for what stands in the end: many wordings of one wish do not push out the others.
    Raises SampleError for remarks and conversations that are no text, OptionError for bounds below 1 and an `eps`
    that is no number.
    """
    a_policy(policy, "write")
    number("eps", eps)
    for name, value in (
        ("max_items", max_items), ("max_tokens", max_tokens), ("max_probes", max_probes),
        ("max_new_tokens", max_new_tokens),
    ):  # fmt: skip
        whole(name, value)
    probes = listed("probes", probes, Probe)

    def bounded(older: Sequence[str], newer: Sequence[str]) -> list[str]:
        return merge(
            older, newer, max_items=max_items, max_tokens=max_tokens, count_tokens=lambda r: _count(tokenizer, r)
        )

    standing, new = usable_remarks(standing), usable_remarks(new)
    own = bounded([], new)
    older = bounded([r for r in standing if r not in new], [])
    hearing = Hearing(policy, tokenizer, [p for p in probes if p.response_ids], max_new_tokens)
    hearing = hearing.within(max_probes, [*older, *own])
    chosen = select(older, own, hearing.change, eps=eps) if hearing.probes else Standing((*older, *own))
    kept = bounded(chosen.remarks, [])
    judged = {remark for remark, _ in chosen.dropped}
    lost = [r for r in usable_remarks([*standing, *new]) if r not in kept and r not in judged]
    over: tuple[tuple[str, Why], ...] = tuple((r, "over_the_bound") for r in lost)
    return Standing(tuple(kept), over + chosen.dropped)


def _count(tokenizer: ChatTokenizer, remark: str) -> int:
    return len(chat_ids(tokenizer, [{"role": "user", "content": remark}], add_generation_prompt=False))
