"""What is scored once per batch, before the first step: the teacher, the base, and the starting student.

Everything here is without gradient. Shape legend: B samples, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.divergence import Target
from sdpo_core.ema import DeltaPolicy, EmaTeacher
from sdpo_core.errors import OptionError
from sdpo_core.options import Options
from sdpo_core.policy import Policy, at_responses, response_logits
from sdpo_core.samples import Sample, TokenBatch, micro_batches, pad_rows, token_batch
from sdpo_core.teachers import trust_region_logits
from sdpo_core.terms import BASE_DISTANCE
from sdpo_core.weights import rollout_weights, top_entropy_mask


@dataclass(frozen=True)
class Scorer:
    """Who scores: the policy and, for teacher `ema`, the state of the average."""

    policy: Policy
    options: Options
    ema: EmaTeacher | None = None

    def __post_init__(self) -> None:
        if self.options.teacher != "ema":
            return
        if self.ema is None:
            raise OptionError("teacher", "'ema' has a state: give train_batch the `ema` from make_ema or load_ema")
        if not isinstance(self.policy, DeltaPolicy):
            raise OptionError("teacher", "'ema' needs a policy that can be scored under other deltas (DeltaPolicy)")

    @torch.no_grad()
    def targets(self, samples: Sequence[Sample]) -> list[Target]:
        """What is kept of the teacher per sample. Teachers `previous` and `live` are the adapter as it is now."""
        found: list[Target] = []
        lengths = [len(s.teacher_prompt_ids) + len(s.response_ids) for s in samples]
        for rows in micro_batches(lengths, self.options.micro_batch_tokens):
            part = [samples[r] for r in rows]
            logits_BTV = self._teacher_logits(self.teacher_batch(part))
            found += [
                dv.teacher_target(logits_BTV[b, : len(s.response_ids)], self.ids(s), self.options.divergence)
                for b, s in enumerate(part)
            ]
        return found

    def teacher_batch(self, samples: Sequence[Sample]) -> TokenBatch:
        """Each sample's told prompt and response."""
        return token_batch([s.teacher_prompt_ids for s in samples], [s.response_ids for s in samples], self.device)

    def student_batch(self, samples: Sequence[Sample]) -> TokenBatch:
        """Each sample's plain prompt and response."""
        return token_batch([s.prompt_ids for s in samples], [s.response_ids for s in samples], self.device)

    def _teacher_logits(self, batch: TokenBatch) -> Tensor:
        """(B, T, V) of the teacher on any prompts."""
        if self.options.teacher in ("previous", "live"):
            return response_logits(self.policy, batch, adapter=True)
        if self.options.teacher == "ema":
            assert isinstance(self.policy, DeltaPolicy)  # noqa: S101 - checked when made
            assert self.ema is not None  # noqa: S101 - checked when made
            logits_BTV = at_responses(self.policy.delta_logits(batch, self.ema.deltas), batch)
        else:
            logits_BTV = response_logits(self.policy, batch, adapter=False)
        if self.options.teacher_mix > 0:
            student_BTV = response_logits(self.policy, batch, adapter=True)
            logits_BTV = trust_region_logits(logits_BTV, student_BTV, self.options.teacher_mix)
        return logits_BTV

    @torch.no_grad()
    def teacher_logp(self, batch: TokenBatch) -> Tensor:
        """(B, T, V) float32 log-probs of the teacher on any prompts."""
        return dv.log_probs(self._teacher_logits(batch))

    @torch.no_grad()
    def base(self, samples: Sequence[Sample]) -> list[BaseScore]:
        """The base model behind the plain prompts."""
        found = []
        for part, logits_BTV in self._plain(samples, adapter=False):
            found += [base_score(logits_BTV[b, : len(s.response_ids)], self.ids(s)) for b, s in enumerate(part)]
        return found

    @torch.no_grad()
    def start(self, samples: Sequence[Sample]) -> list[StartScore]:
        """The student as it is now, behind the plain prompts."""
        found = []
        for part, logits_BTV in self._plain(samples, adapter=True):
            found += [start_score(logits_BTV[b, : len(s.response_ids)], self.ids(s)) for b, s in enumerate(part)]
        return found

    def _plain(self, samples: Sequence[Sample], *, adapter: bool) -> list[tuple[list[Sample], Tensor]]:
        parts = [[samples[r] for r in rows] for rows in self.groups(samples)]
        return [(part, response_logits(self.policy, self.student_batch(part), adapter=adapter)) for part in parts]

    def groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Micro-batches of the plain prompts: row numbers."""
        return micro_batches([s.student_length for s in samples], self.options.micro_batch_tokens)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def ids(self, sample: Sample) -> Tensor:
        """(T,)"""
        return torch.tensor(sample.response_ids, device=self.device)


@dataclass(frozen=True)
class BaseScore:
    """The base model's view of one sample's plain prompt."""

    logp: Tensor
    """Of the response tokens, (T,)."""
    target: Target
    """For the reported distance."""


@dataclass(frozen=True)
class StartScore:
    """The starting student's view of one sample's plain prompt; both (T,)."""

    logp: Tensor
    entropy: Tensor


def base_score(logits_TV: Tensor, ids_T: Tensor) -> BaseScore:
    """What is kept of the base's logits behind a plain prompt."""
    logp_T = dv.token_log_probs(dv.log_probs(logits_TV), ids_T)
    return BaseScore(logp_T, dv.teacher_target(logits_TV, ids_T, BASE_DISTANCE))


def start_score(logits_TV: Tensor, ids_T: Tensor) -> StartScore:
    """What is kept of the starting student's logits behind a plain prompt."""
    logp_TV = dv.log_probs(logits_TV)
    return StartScore(dv.token_log_probs(logp_TV, ids_T), dv.entropy(logp_TV))


@dataclass(frozen=True)
class Fixed:
    """What does not change during the batch, per live sample."""

    base: list[BaseScore] | None
    start: list[StartScore] | None
    token_weights: list[Tensor] | None
    """(T,) each: rollout correction times the entropy mask."""


class FixedScorer(Protocol):
    """The part of a path that scores what is fixed."""

    @property
    def options(self) -> Options: ...

    def base(self, samples: Sequence[Sample]) -> list[BaseScore]: ...

    def start(self, samples: Sequence[Sample]) -> list[StartScore]: ...


def score_fixed(scorer: FixedScorer, live: Sequence[Sample], known: list[BaseScore] | None = None) -> Fixed:
    """Score what the options need and nothing else; `known`: the base's, scored ahead."""
    options = scorer.options
    start = scorer.start(live) if options.needs_start else None
    weights = None if start is None else token_weights(live, start, options)
    if not options.needs_base:
        return Fixed(None, start, weights)
    return Fixed(scorer.base(live) if known is None else known, start, weights)


def token_weights(live: Sequence[Sample], start: Sequence[StartScore], options: Options) -> list[Tensor]:
    """Fixed weights of each response token, (T,) per sample: rollout correction times the top-entropy mask."""
    mask_BT = pad_rows([torch.ones_like(s.logp) for s in start])
    weights_BT = mask_BT
    if options.rollout_correction != "none":
        log_ratio_BT = pad_rows([_engine_log_ratio(s, own) for s, own in zip(live, start, strict=True)])
        weights_BT = rollout_weights(
            log_ratio_BT, mask_BT, level=options.rollout_correction,
            threshold=options.rollout_threshold, batch_normalise=options.rollout_normalise,
        )  # fmt: skip
    if options.top_entropy < 1.0:
        weights_BT = weights_BT * top_entropy_mask(pad_rows([s.entropy for s in start]), mask_BT, options.top_entropy)
    return [weights_BT[b, : len(s.response_ids)] for b, s in enumerate(live)]


def _engine_log_ratio(sample: Sample, own: StartScore) -> Tensor:
    """trainer - engine under the same weights, (T,); 0 where nothing was recorded."""
    if sample.behaviour_logprobs is None:
        return torch.zeros_like(own.logp)
    return own.logp - torch.tensor(sample.behaviour_logprobs, device=own.logp.device)


def join_targets(targets: Sequence[Target]) -> Target:
    """Per-sample targets (T_b, ...) as one padded batch (B, T, ...)."""
    index = [t.index for t in targets if t.index is not None]
    tails = [t.log_tail for t in targets if t.log_tail is not None]
    gaps = [t.gap for t in targets if t.gap is not None]
    return Target(
        pad_rows([t.logp for t in targets]), pad_rows(index) if index else None, pad_rows(tails) if tails else None,
        join_targets(gaps) if gaps else None,
    )  # fmt: skip
