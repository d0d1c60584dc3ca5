"""Standing feedback: the remarks a teacher must keep hearing so that new feedback does not erase old.

A frozen teacher told only the newest remark pulls the adapter away from everything learnt before. So each version
carries a short list of remarks, oldest first, and every later batch's teacher is told it. The list must stay short
and true: repeats, praise and remarks that a newer one contradicts are dropped. The teacher itself is the judge: a
remark stands if it changes what the teacher says.

The decision (`select`) is apart from the model calls (`teacher_effect`), so it can be tested and replaced alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sdpo_core import divergence as dv
from sdpo_core.chat import ChatTokenizer, chat_ids
from sdpo_core.policy import Policy, response_logits
from sdpo_core.samples import micro_batches, token_batch
from sdpo_core.teacher_context import DEFAULT_TEMPLATE, ContextTemplate, teacher_messages, usable_remarks

DEFAULT_EPS = 0.05
"""Mean KL in nats per response token below which a remark alone changes nothing. Measured: docs/algorithm.md."""
DEFAULT_SHARE = 0.2
"""A remark that alone has effect e adds something beside newer ones if it still has more than this share of e."""
_MEMO_ELEMENTS = 1 << 26
"""Opinions above this many floats (256 MB) are recomputed rather than kept."""

Effect = Callable[[Sequence[str], Sequence[str]], float]
"""effect(without, with_): how much the teacher's answers change when `with_` is told instead of `without`, >= 0."""

Why = Literal["repeated_or_contradicted", "changes_nothing", "over_the_bound"]


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

    The newest are kept while both bounds hold; older ones fall off.
    """
    kept: list[str] = []
    tokens = 0
    for remark in reversed(usable_remarks([*standing, *new])):
        tokens += count_tokens(remark)
        if len(kept) == max_items or tokens > max_tokens:
            break
        kept.append(remark)
    return kept[::-1]


def select(
    standing: Sequence[str],
    new: Sequence[str],
    effect: Effect,
    *,
    eps: float = DEFAULT_EPS,
    share: float = DEFAULT_SHARE,
) -> Standing:
    """Which remarks stand after a batch. `new` are the batch's own, in order; of a repeat the newest place counts.

    Newest first, each remark is heard alone and in front of the newer ones. If it adds to them it stands. If it adds
    nothing, although alone it would change the answers, a newer remark says the same or the opposite: it is dropped.
    A remark that changes nothing even alone is silent: it stays in the room while older ones are judged (it may be
    what contradicts them), then a new one goes, as praise does; an older one stays, since these prompts may just not
    be what it is about.
    """
    older = set(usable_remarks(standing)) - set(usable_remarks(new))
    told: list[str] = []
    silent: list[str] = []
    dropped: list[tuple[str, Why]] = []
    for remark in reversed(usable_remarks([*standing, *new])):
        alone = effect([], [remark])
        if alone < eps:
            silent.insert(0, remark)
        elif told and effect(told, [remark, *told]) < share * alone:
            dropped.append((remark, "repeated_or_contradicted"))
            continue
        told.insert(0, remark)
    for remark in silent:
        rest = [r for r in told if r != remark]
        if remark not in older and effect(rest, told) < eps:
            told = rest
            dropped.append((remark, "changes_nothing"))
    return Standing(tuple(told), tuple(dropped))


@dataclass(frozen=True)
class Probe:
    """A conversation and an answer to it, on which the teacher's opinion is compared."""

    messages: Sequence[Mapping[str, Any]]
    response_ids: tuple[int, ...]


def teacher_effect(
    policy: Policy,
    tokenizer: ChatTokenizer,
    probes: Sequence[Probe],
    *,
    micro_batch_tokens: int = 8192,
    template: ContextTemplate = DEFAULT_TEMPLATE,
) -> Effect:
    """An `Effect` asking the frozen teacher (adapter off): mean over response tokens of KL(with || without), nats."""
    teacher = _Teacher(policy, tokenizer, probes, micro_batch_tokens, template)

    def effect(without: Sequence[str], with_: Sequence[str]) -> float:
        total, tokens = 0.0, 0
        for plain_TV, told_TV in zip(teacher.opinions(without), teacher.opinions(with_), strict=True):
            total += float((told_TV.exp() * (told_TV - plain_TV)).sum(-1).double().sum())
            tokens += told_TV.shape[0]
        return total / max(tokens, 1)

    return effect


@dataclass
class _Teacher:
    """The frozen teacher's log-probs on the probes' response tokens, told some remarks."""

    policy: Policy
    tokenizer: ChatTokenizer
    probes: Sequence[Probe]
    micro_batch_tokens: int
    template: ContextTemplate
    memo: dict[tuple[str, ...], list[torch.Tensor]] = field(default_factory=dict)
    """The last few opinions, where they are small: one comparison's base line is mostly the next one's too."""

    def opinions(self, remarks: Sequence[str]) -> Iterable[torch.Tensor]:
        """(T, V) log-probs per probe."""
        key = tuple(remarks)
        if key in self.memo:
            return self.memo[key]
        scored = self._score(key)
        tokens = sum(len(p.response_ids) for p in self.probes)
        first = next(scored)
        everything = itertools.chain([first], scored)
        if tokens * first.shape[-1] > _MEMO_ELEMENTS:
            return everything
        while len(self.memo) >= 3:
            del self.memo[next(k for k in self.memo if k)]  # "told nothing" is needed for every remark: keep it
        self.memo[key] = list(everything)
        return self.memo[key]

    def _score(self, remarks: Sequence[str]) -> Iterator[torch.Tensor]:
        prompts = [chat_ids(self.tokenizer, self._messages(p, remarks)) for p in self.probes]
        lengths = [len(ids) + len(p.response_ids) for ids, p in zip(prompts, self.probes, strict=True)]
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            answers = [self.probes[r].response_ids for r in rows]
            batch = token_batch([prompts[r] for r in rows], answers, self.policy.device)
            with torch.no_grad():
                logp_BTV = dv.log_probs(response_logits(self.policy, batch, adapter=False))
            yield from (logp_BTV[b, : len(a)] for b, a in enumerate(answers))

    def _messages(self, probe: Probe, remarks: Sequence[str]) -> list[dict[str, str]]:
        return teacher_messages(probe.messages, remarks, None, self.template)


def update_standing(
    policy: Policy,
    tokenizer: ChatTokenizer,
    standing: Sequence[str],
    new: Sequence[str],
    probes: Sequence[Probe],
    *,
    eps: float = DEFAULT_EPS,
    share: float = DEFAULT_SHARE,
    max_items: int = 32,
    max_tokens: int = 1024,
    max_probes: int = 8,
) -> Standing:
    """The remarks that stand after a batch whose own remarks are `new` and whose rollouts are `probes`.

    At most `max_probes` of the probes, evenly spread, are scored. Without probes nothing can be judged: the merged list
    stands, within its bounds.
    """
    merged = merge(
        standing, new, max_items=max_items, max_tokens=max_tokens, count_tokens=lambda r: _count(tokenizer, r)
    )
    lost = [r for r in usable_remarks([*standing, *new]) if r not in merged]
    over: tuple[tuple[str, Why], ...] = tuple((r, "over_the_bound") for r in lost)
    answered = [p for p in probes if p.response_ids]
    if not answered:
        return Standing(tuple(merged), over)
    stride = max(1, -(-len(answered) // max_probes))
    effect = teacher_effect(policy, tokenizer, answered[::stride])
    fresh = set(usable_remarks(new))
    chosen = select(
        [r for r in merged if r not in fresh], [r for r in merged if r in fresh], effect, eps=eps, share=share
    )
    return Standing(chosen.remarks, over + chosen.dropped)


def _count(tokenizer: ChatTokenizer, remark: str) -> int:
    return len(chat_ids(tokenizer, [{"role": "user", "content": remark}], add_generation_prompt=False))
