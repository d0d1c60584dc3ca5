"""Standing feedback: the remarks a teacher must keep hearing so that new feedback does not erase old.

A frozen teacher told only the newest remark pulls the adapter away from everything learnt before. So each version
carries a short list of remarks, oldest first, and every later batch's teacher is told it. The list must stay short
and true: repeats, praise and remarks that a newer one contradicts have to go. The teacher itself is the judge, by how
its distributions change on a batch's own prompts and answers when it is told a remark or not.

The decision (`select`) is apart from the model calls (`teacher_effect`), so it can be tested and replaced alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.chat import ChatTokenizer, chat_ids
from sdpo_core.policy import Policy, response_logits
from sdpo_core.samples import micro_batches, token_batch
from sdpo_core.teacher_context import DEFAULT_TEMPLATE, ContextTemplate, teacher_messages, usable_remarks

DEFAULT_EPS = 0.25
"""A remark whose largest effect on a token, mean over answers, is below this many nats changes nothing. Measured."""
DEFAULT_SHARE = 0.2
"""A remark adds nothing if beside others it has less than this share of the effect it has alone. Measured."""
DEFAULT_CONFLICT = 0.5
"""A wish is lost if, where it matters, the teacher is further from it than this share of what the bare model is."""

_MEMO_ELEMENTS = 1 << 26
"""Opinions are remembered up to this many floats (256 MB)."""

_PLAUSIBLE = 0.02
"""Where an answer takes a token that a teacher gives less than this, its opinion on what follows means nothing."""

Shift = Sequence[Tensor]
"""Per answer, (T,): KL(told || not told) at each response token, nats; nan from where the answer, so far, is no longer
one that both would give."""
Effect = Callable[[Sequence[str], Sequence[str]], Shift]
"""effect(without, with_): how the teacher's answers change when it is told `with_` instead of `without`."""

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
    conflict: float = DEFAULT_CONFLICT,
) -> Standing:
    """Which remarks stand after a batch whose own remarks are `new`, in order.

    Each new remark in turn: if the teacher, told the standing ones, does not change its answers for it, it is praise or
    a repeat and goes. If it does, older remarks that it contradicts go: those whose wish, visible on these prompts when
    told alone, is neither heard beside it nor fulfilled. What merely happens to be fulfilled without being said stays,
    and so does what these prompts are not about. A remark that asks for what the bare model does anyway contradicts,
    and then goes as well. An exact repeat counts at its newest place.
    """
    judge = _Judge(effect, eps, share, conflict)
    fresh = usable_remarks(new)
    stand = [r for r in usable_remarks(standing) if r not in fresh]
    dropped: list[tuple[str, Why]] = []
    for remark in fresh:
        if not judge.adds(remark, stand):
            dropped.append((remark, "changes_nothing" if judge.silent(remark) else "repeated"))
            continue
        lost = [older for older in stand if judge.contradicts(remark, older, stand)]
        dropped += [(older, "contradicted") for older in lost]
        stand = [older for older in stand if older not in lost]
        if judge.silent(remark):
            dropped.append((remark, "changes_nothing"))
        else:
            stand.append(remark)
    for remark in reversed(stand):
        others = [r for r in stand if r != remark]
        if any(judge.same(remark, other) for other in others):
            stand = others
            dropped.append((remark, "repeated"))
    return Standing(tuple(stand), tuple(dropped))


@dataclass(frozen=True)
class _Judge:
    """The questions `select` asks about an effect."""

    effect: Effect
    eps: float
    share: float
    conflict: float

    def alone(self, remark: str) -> Shift:
        return self.effect([], [remark])

    def silent(self, remark: str) -> bool:
        """Told alone, it changes nothing on these prompts, and an answer that was judged to its end could show it.

        Where every answer leaves what the teacher finds plausible, most of it was not looked at: no verdict, it stands.
        """
        shift = self.alone(remark)
        return _peak(shift) < self.eps and any(not bool(kl_T.isnan().any()) for kl_T in shift)

    def adds(self, remark: str, stand: Sequence[str]) -> bool:
        """Told after the standing remarks, it changes the answers, or asks for what they do not bring about."""
        change = self.effect(stand, [*stand, remark])
        if self.silent(remark):
            return _peak(change) >= self.eps
        alone = self.alone(remark)
        return _ratio(change, alone) >= self.share or self.missed(remark, stand) is not False

    def missed(self, wish: str, told: Sequence[str]) -> bool | None:
        """Whether a teacher told `told` stays away from what `wish` asks for; None where these answers cannot show it.

        Its distance from the wish, weighted by where the wish asks for something, against the bare model's distance.
        """
        alone, apart = self.alone(wish), self.effect(told, [wish])
        seen = [torch.where(there.isnan(), there, kl_T) for kl_T, there in zip(alone, apart, strict=True)]
        if _peak(seen) < self.eps:
            return None
        weighted = [kl_T * far_T for kl_T, far_T in zip(alone, apart, strict=True)]
        return _ratio(weighted, [kl_T * kl_T for kl_T in alone]) >= self.conflict

    def contradicts(self, newest: str, older: str, stand: Sequence[str]) -> bool:
        """`older` is about these prompts, is not heard any more beside `newest`, and its wish is not fulfilled."""
        if self.silent(older):
            return False
        without = [*(r for r in stand if r != older), newest]
        heard = self.effect(without, [*stand, newest])
        return _ratio(heard, self.alone(older)) < self.share and self.missed(older, without) is True

    def same(self, a: str, b: str) -> bool:
        """Told alone, either makes the teacher answer alike."""
        if self.silent(a) or self.silent(b):
            return False
        return self.missed(a, [b]) is False and self.missed(b, [a]) is False


def _peak(shift: Shift) -> float:
    """Largest token, mean over answers: not diluted by long answers."""
    return float(torch.stack([kl_T.nan_to_num(0.0).max() for kl_T in shift]).mean())


def _ratio(part: Shift, whole: Shift) -> float:
    """Sum over sum, where both are known."""
    a, b = torch.cat(list(part)), torch.cat(list(whole))
    known = ~(a.isnan() | b.isnan())
    return float(a[known].sum() / b[known].sum().clamp(min=1e-12))


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
    """An `Effect` asking the frozen teacher (adapter off) about the probes, each with at least one response token."""
    teacher = _Teacher(policy, tokenizer, probes, micro_batch_tokens, template)

    def effect(without: Sequence[str], with_: Sequence[str]) -> Shift:
        trios = zip(teacher.opinions(with_), teacher.opinions(without), probes, strict=True)
        return [_shift(told_TV, plain_TV, probe.response_ids) for told_TV, plain_TV, probe in trios]

    return effect


def _shift(told_TV: Tensor, plain_TV: Tensor, response_ids: Sequence[int]) -> Tensor:
    """KL(told || plain) per token, nan behind the first token that either finds implausible."""
    ids_T = torch.tensor(response_ids, device=told_TV.device)
    kl_T = (told_TV.exp() * (told_TV - plain_TV)).sum(-1)
    least_T = torch.minimum(dv.token_log_probs(told_TV, ids_T), dv.token_log_probs(plain_TV, ids_T))
    off_T = (least_T < math.log(_PLAUSIBLE)).int()
    behind_T = off_T.cumsum(0) - off_T > 0
    return kl_T.masked_fill(behind_T, math.nan).double().cpu()


@dataclass
class _Teacher:
    """The frozen teacher's log-probs on the probes' response tokens, told some remarks."""

    policy: Policy
    tokenizer: ChatTokenizer
    probes: Sequence[Probe]
    micro_batch_tokens: int
    template: ContextTemplate
    memo: dict[tuple[str, ...], list[Tensor]] = field(default_factory=dict)

    def opinions(self, remarks: Sequence[str]) -> Iterable[Tensor]:
        """(T, V) log-probs per probe; remembered while there is room, for the same few are asked for again."""
        key = tuple(remarks)
        if key in self.memo:
            return self.memo[key]
        scored = self._score(key)
        first = next(scored)
        everything = itertools.chain([first], scored)
        size = first.shape[-1] * sum(len(p.response_ids) for p in self.probes)
        if size * (len(self.memo) + 1) > _MEMO_ELEMENTS:
            return everything
        self.memo[key] = list(everything)
        return self.memo[key]

    def _score(self, remarks: Sequence[str]) -> Iterator[Tensor]:
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
    conflict: float = DEFAULT_CONFLICT,
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
    older, own = [r for r in merged if r not in fresh], [r for r in merged if r in fresh]
    chosen = select(older, own, effect, eps=eps, share=share, conflict=conflict)
    return Standing(chosen.remarks, over + chosen.dropped)


def _count(tokenizer: ChatTokenizer, remark: str) -> int:
    return len(chat_ids(tokenizer, [{"role": "user", "content": remark}], add_generation_prompt=False))
