"""What a remark does to the frozen teacher: the model calls behind standing feedback.

The teacher is compared with itself on answers of its own. Told one list of remarks it writes; told another it reads
that text. Up to the first token on which the two part, the text is what both would write, so the place where they part
is always in sight; behind it neither's opinion means anything. A student's answers would not do: they leave what the
teacher finds plausible wherever the student has not learnt a wish yet, and hide everything behind that place.

Shape legend: B probes, T tokens written, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.chat import ChatTokenizer, chat_ids
from sdpo_core.fast.prefixes import PrefixReader, Read
from sdpo_core.policy import response_logits
from sdpo_core.samples import micro_batches, token_batch
from sdpo_core.teacher_context import DEFAULT_TEMPLATE, ContextTemplate, teacher_messages
from sdpo_core.writing import Writer

_MEMO_ELEMENTS = 1 << 26
"""Opinions are remembered up to this many floats (256 MB)."""
_PLAUSIBLE = 0.02
"""Behind a token that either gives less than this, opinions mean nothing."""

Remarks = tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A conversation to which the teacher's answers are compared, and the answer that was remarked on."""

    messages: Sequence[Mapping[str, Any]]
    response_ids: tuple[int, ...]
    tools: Sequence[Any] | None = None
    """What the conversation offered the model, as in `teacher_prompt`: the judge reads what training does."""
    template_options: Mapping[str, Any] | None = None
    """What else the chat template was given."""


@dataclass
class Hearing:
    """The frozen teacher on some conversations. `change` is all that is asked of it."""

    policy: Writer
    tokenizer: ChatTokenizer
    probes: Sequence[Probe]
    max_new_tokens: int = 128
    """Of each answer that is looked at; what comes later is not judged."""
    micro_batch_tokens: int = 8192
    template: ContextTemplate = DEFAULT_TEMPLATE
    _written: dict[Remarks, list[tuple[int, ...]]] = field(default_factory=dict)
    _opinions: dict[tuple[Remarks, Remarks], list[Tensor]] = field(default_factory=dict)
    _known: tuple[Remarks, Read] | None = None
    """The text that was read last under its own remarks; what it takes is no more than writing it took."""

    def within(self, most: int, told: Sequence[str]) -> Hearing:
        """On at most so many of the conversations, evenly spread over those that fit the window with `told` and an
        answer."""
        window = getattr(self.policy, "window", None)
        probes = self.probes
        if window is not None:
            prompts = self._prompts(tuple(told))
            probes = [b for b, p in zip(probes, prompts, strict=True) if len(p) + self.max_new_tokens <= window]
        return replace(self, probes=probes[:: max(1, -(-len(probes) // most))])

    def change(self, told: Sequence[str], instead: Sequence[str]) -> float:
        """How differently the teacher would go on with its answers, told `instead` of `told`: nats.

        KL(told `instead` || told `told`) at the token where it is largest, mean over answers, on the answers that the
        teacher writes when told `told`.
        """
        text = tuple(told)
        peaks = [
            _peak(read_TV, own_TV, ids)
            for own_TV, read_TV, ids in zip(
                self._opinion(text, text), self._opinion(text, tuple(instead)), self._text(text), strict=True
            )
        ]
        return sum(peaks) / len(peaks)

    def _prompts(self, told: Remarks) -> list[list[int]]:
        return [
            chat_ids(
                self.tokenizer,
                teacher_messages(probe.messages, told, None, self.template),
                tools=probe.tools,
                template_options=probe.template_options,
            )
            for probe in self.probes
        ]

    def _text(self, told: Remarks) -> list[tuple[int, ...]]:
        if told not in self._written:
            self._written[told] = self.policy.write(self._prompts(told), self.max_new_tokens)
        return self._written[told]

    def _opinion(self, text: Remarks, told: Remarks) -> list[Tensor]:
        """(T, V) log-probs per answer that was written when told `text`, read by the teacher told `told`."""
        key = (text, told)
        if key in self._opinions:
            return self._opinions[key]
        scored = self._read(text, told)
        held = sum(logp_TV.numel() for opinion in self._opinions.values() for logp_TV in opinion)
        if held + sum(logp_TV.numel() for logp_TV in scored) <= _MEMO_ELEMENTS:
            self._opinions[key] = scored
        return scored

    def _read(self, text: Remarks, told: Remarks) -> list[Tensor]:
        """Where the policy can, behind what the text's own prompt has in common with this one."""
        answers, prompts, policy = self._text(text), self._prompts(told), self.policy
        tokens = sum(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        if not isinstance(policy, PrefixReader) or not policy.reads_on or tokens > self.micro_batch_tokens:
            return list(self._score(answers, prompts))
        known = self._known[1] if self._known is not None and self._known[0] == text else None
        logits, read = policy.read(prompts, answers, known)
        if text == told:
            self._known = (text, read)
        return [dv.log_probs(logits_TV) for logits_TV in logits]

    def _score(self, answers: Sequence[tuple[int, ...]], prompts: Sequence[list[int]]) -> Iterator[Tensor]:
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            part = [answers[r] for r in rows]
            batch = token_batch([prompts[r] for r in rows], part, self.policy.device)
            with torch.no_grad():
                logp_BTV = dv.log_probs(response_logits(self.policy, batch, adapter=False))
            yield from (logp_BTV[b, : len(a)] for b, a in enumerate(part))


def _peak(read_TV: Tensor, own_TV: Tensor, ids: Sequence[int]) -> float:
    """Largest KL(read || own) up to, and with, the first token that either finds implausible."""
    ids_T = torch.tensor(ids, device=read_TV.device)
    kl_T = (read_TV.exp() * (read_TV - own_TV)).sum(-1)
    least_T = torch.minimum(dv.token_log_probs(read_TV, ids_T), dv.token_log_probs(own_TV, ids_T))
    off_T = (least_T < math.log(_PLAUSIBLE)).int()
    behind_T = off_T.cumsum(0) - off_T > 0
    return float(kl_T.masked_fill(behind_T, 0.0).max())
