"""One batch of feedback through the student: the training loop.

Read top to bottom: score the teacher once, then per step forward and backward every micro-batch with the whole
batch's denominators, look at the gap, clip, update. Nothing here knows what a model is (sdpo_core.policy) or where
samples come from.

On the ratio: without `refresh` it stays pi_now / pi_rollout. With `refresh` the weights after each step are declared
the behaviour policy, so from step 2 on the ratio is 1. That switches the correction off; it does not correct.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdpo_core import divergence as dv
from sdpo_core.aggregation import row_weights
from sdpo_core.divergence import Target
from sdpo_core.options import Options
from sdpo_core.policy import Policy, response_logits
from sdpo_core.samples import Sample, micro_batches, pad_rows, token_batch
from sdpo_core.teachers import trust_region_logits
from sdpo_core.terms import BASE_DISTANCE, TokenTerms, token_terms

StopReason = Literal["steps", "gap_closed", "cancelled", "nothing_to_teach"]
Behaviour = Literal["engine", "recomputed"]
Outcome = Literal["updated", "gap_closed", "non_finite"]


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw, measured before its update. Means are weighted as the loss weights its tokens."""

    step: int
    """From 1."""
    loss: float
    distill_loss: float
    anchor_loss: float
    """k3 to the base, unweighted by `base_kl_weight`; nan when the base was not scored."""
    gap: float
    """Teacher-student distance, nats per response token, plain token mean."""
    base_kl: float
    """KL(student || base), nats per response token (TokenTerms.base_kl); nan when the base was not scored."""
    peak_gap: float
    """Largest token's distance in each answer, mean over answers: a wish about one spot is not diluted by length."""
    mean_ratio: float
    max_ratio: float
    """Largest ratio before the clip."""
    clip_fraction: float
    entropy: float
    """Of the student, nats per response token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    response_tokens: int
    seconds: float
    outcome: Outcome
    """What became of the step: weights moved, the gap was already closed, or the gradient was not finite."""


@dataclass(frozen=True)
class SampleOutcome:
    taught: bool
    behaviour: Behaviour
    """Where the behaviour log-probs came from; `recomputed` = under the weights the batch started from."""
    reason: Literal["", "no_feedback", "empty_response"] = ""
    """Why the sample taught nothing."""


@dataclass(frozen=True)
class BatchResult:
    steps: tuple[StepMetrics, ...]
    samples: tuple[SampleOutcome, ...]
    stop_reason: StopReason
    warnings: tuple[str, ...] = ()

    @property
    def updates(self) -> int:
        """Optimizer steps that moved the weights."""
        return sum(s.outcome == "updated" for s in self.steps)

    @property
    def skipped_non_finite(self) -> int:
        return sum(s.outcome == "non_finite" for s in self.steps)

    @property
    def masked_samples(self) -> int:
        return sum(not s.taught for s in self.samples)


def train_batch(
    policy: Policy,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    options: Options,
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> BatchResult:
    """Train the policy's adapter on one batch, in place. Deterministic on CPU.

    `optimizer` comes from `make_optimizer` / `load_optimizer`, over `policy.trainable()`. `on_step` is called after
    each step; `should_stop` is asked before each (true: stop, keeping the updates made so far).
    """
    outcomes = tuple(_outcome(s) for s in samples)
    live = [s for s in samples if s.live]
    if not live:
        return BatchResult((), outcomes, "nothing_to_teach")
    run = _Run(policy, optimizer, options, live, _score_fixed(policy, live, options))
    stop_reason: StopReason = "steps"
    for number in range(1, options.steps + 1):
        if should_stop is not None and should_stop():
            stop_reason = "cancelled"
            break
        metrics = run.step(number)
        if on_step is not None:
            on_step(metrics)
        if metrics.outcome == "gap_closed":
            stop_reason = "gap_closed"
            break
    return BatchResult(tuple(run.history), outcomes, stop_reason, tuple(run.warnings))


def _outcome(sample: Sample) -> SampleOutcome:
    behaviour: Behaviour = "recomputed" if sample.behaviour_logprobs is None else "engine"
    if not sample.taught:
        return SampleOutcome(False, behaviour, "no_feedback")
    if not sample.response_ids:
        return SampleOutcome(False, behaviour, "empty_response")
    return SampleOutcome(True, behaviour)


@dataclass(frozen=True)
class _Fixed:
    """What does not change during the batch, per live sample."""

    targets: list[Target]
    base: list[_Base] | None


@dataclass(frozen=True)
class _Base:
    """The base model's view of one sample's plain prompt."""

    logp: Tensor
    """Of the response tokens, (T,)."""
    target: Target
    """For the reported distance."""


@torch.no_grad()
def _score_fixed(policy: Policy, live: Sequence[Sample], options: Options) -> _Fixed:
    targets: list[Target] = []
    base: list[_Base] = []
    teacher_lengths = [len(s.teacher_prompt_ids) + len(s.response_ids) for s in live]
    for rows in micro_batches(teacher_lengths, options.micro_batch_tokens):
        targets += _teacher_targets(policy, [live[r] for r in rows], options)
    if options.needs_base:
        for rows in micro_batches([s.student_length for s in live], options.micro_batch_tokens):
            base += _base_scores(policy, [live[r] for r in rows])
    return _Fixed(targets, base if options.needs_base else None)


def _teacher_targets(policy: Policy, samples: Sequence[Sample], options: Options) -> list[Target]:
    batch = token_batch([s.teacher_prompt_ids for s in samples], [s.response_ids for s in samples], policy.device)
    logits_BTV = response_logits(policy, batch, adapter=False)
    if options.teacher_mix > 0:
        student_BTV = response_logits(policy, batch, adapter=True)
        logits_BTV = trust_region_logits(logits_BTV, student_BTV, options.teacher_mix)
    return [
        dv.teacher_target(logits_BTV[b, : len(s.response_ids)], _ids(s, policy), options.divergence)
        for b, s in enumerate(samples)
    ]


def _base_scores(policy: Policy, samples: Sequence[Sample]) -> list[_Base]:
    batch = token_batch([s.prompt_ids for s in samples], [s.response_ids for s in samples], policy.device)
    logits_BTV = response_logits(policy, batch, adapter=False)
    found = []
    for b, s in enumerate(samples):
        logits_TV, ids_T = logits_BTV[b, : len(s.response_ids)], _ids(s, policy)
        logp_T = dv.token_log_probs(dv.log_probs(logits_TV), ids_T)
        found.append(_Base(logp_T, dv.teacher_target(logits_TV, ids_T, BASE_DISTANCE)))
    return found


def _ids(sample: Sample, policy: Policy) -> Tensor:
    return torch.tensor(sample.response_ids, device=policy.device)


def _join(targets: Sequence[Target]) -> Target:
    """Per-sample targets (T_b, ...) as one padded batch (B, T, ...)."""
    index = [t.index for t in targets if t.index is not None]
    tails = [t.log_tail for t in targets if t.log_tail is not None]
    return Target(
        pad_rows([t.logp for t in targets]), pad_rows(index) if index else None, pad_rows(tails) if tails else None
    )


@dataclass
class _Sums:
    """Running sums over the micro-batches of one step, in float64."""

    distill: float = 0.0
    anchor: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    weight: float = 0.0
    gap: float = 0.0
    peak_gap: float = 0.0
    base_kl: float = 0.0
    entropy: float = 0.0
    max_ratio: float = 0.0

    def add(self, terms: TokenTerms, mask_BT: Tensor, weights_B: Tensor, clip: float | None) -> None:
        def weighted(x_BT: Tensor) -> float:
            return float((x_BT.detach().double().sum(-1) * weights_B.double()).sum())

        self.distill += weighted(terms.distill)
        self.anchor += weighted(terms.anchor)
        self.ratio += weighted(terms.ratio)
        self.weight += weighted(mask_BT)
        if clip is not None:
            self.clipped += weighted((terms.ratio >= clip) & mask_BT)
        self.gap += float(terms.gap.double().sum())
        self.base_kl += float(terms.base_kl.double().sum())
        self.peak_gap += float(terms.gap.amax(-1).double().sum())
        self.entropy += float(terms.entropy.double().sum())
        self.max_ratio = max(self.max_ratio, float(terms.raw_ratio.max()))


@dataclass
class _Run:
    """The state of one batch: live samples, what is fixed, the current behaviour log-probs, the history."""

    policy: Policy
    optimizer: Optimizer
    options: Options
    live: list[Sample]
    fixed: _Fixed
    behaviour: list[Tensor | None] = field(init=False)
    """Per sample; None = take the student's own at the next forward pass."""
    history: list[StepMetrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = [len(s.response_ids) for s in self.live]
        self.tokens = sum(lengths)
        self.weights = row_weights(lengths, self.options.aggregation)
        self.groups = micro_batches([s.student_length for s in self.live], self.options.micro_batch_tokens)
        self.behaviour = [
            None if s.behaviour_logprobs is None else torch.tensor(s.behaviour_logprobs, device=self.policy.device)
            for s in self.live
        ]

    def step(self, number: int) -> StepMetrics:
        """One forward and backward over the batch, then the update unless there is a reason not to."""
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        sums = _Sums()
        for rows in self.groups:
            self._backward(rows, sums)
        parameters = [p for _, p in self.policy.trainable()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm))
        outcome = self._decide(sums.peak_gap / len(self.live), norm)
        if outcome == "updated":
            self._update()
        metrics = self._metrics(number, sums, norm, outcome, time.perf_counter() - started)
        self._watch(metrics)
        self.history.append(metrics)
        return metrics

    def _backward(self, rows: list[int], sums: _Sums) -> None:
        samples = [self.live[r] for r in rows]
        device = self.policy.device
        batch = token_batch([s.prompt_ids for s in samples], [s.response_ids for s in samples], device)
        mask_BT = batch.mask()
        weights_B = torch.tensor([self.weights[r] for r in rows], device=device)
        logits_BTV = response_logits(self.policy, batch, adapter=True)
        ids_BT = pad_rows([_ids(s, self.policy) for s in samples])
        base = None if self.fixed.base is None else [self.fixed.base[r] for r in rows]
        target = _join([self.fixed.targets[r] for r in rows])
        terms = token_terms(
            logits_BTV, target, ids_BT, mask_BT, self.options.divergence,
            is_clip=self.options.is_clip, behaviour_BT=self._behaviour(rows),
            base_logp_BT=None if base is None else pad_rows([b.logp for b in base]),
            base_target=None if base is None else _join([b.target for b in base]),
        )  # fmt: skip
        self._remember(rows, terms.logp)
        loss_BT = terms.distill + self.options.base_kl_weight * terms.anchor
        loss: Tensor = (loss_BT.sum(-1) * weights_B).sum()
        torch.autograd.backward(loss)
        sums.add(terms, mask_BT, weights_B, self.options.is_clip)

    def _behaviour(self, rows: list[int]) -> Tensor:
        """Behaviour log-probs of these rows, NaN where the student's own are to be taken."""
        unknown = [torch.full((len(self.live[r].response_ids),), math.nan, device=self.policy.device) for r in rows]
        known = [self.behaviour[r] for r in rows]
        return pad_rows([u if k is None else k for k, u in zip(known, unknown, strict=True)])

    def _remember(self, rows: list[int], logp_BT: Tensor) -> None:
        """Student log-probs that just stood in for unknown ones are the behaviour log-probs from here on."""
        for b, r in enumerate(rows):
            if self.behaviour[r] is None:
                self.behaviour[r] = logp_BT[b, : len(self.live[r].response_ids)].clone()

    def _decide(self, peak_gap: float, norm: float) -> Outcome:
        if not (math.isfinite(norm) and math.isfinite(peak_gap)):
            return "non_finite"
        first = self.history[0].peak_gap if self.history else math.inf
        closed = peak_gap < self.options.stop_gap
        closed = closed or (math.isfinite(first) and peak_gap < self.options.stop_gap_ratio * first)
        return "gap_closed" if closed else "updated"

    def _update(self) -> None:
        self.optimizer.step()
        if self.options.refresh:
            # The next forward pass is under the new weights: its log-probs become the behaviour log-probs.
            self.behaviour = [None] * len(self.live)

    def _metrics(self, number: int, sums: _Sums, norm: float, outcome: Outcome, seconds: float) -> StepMetrics:
        anchored = self.fixed.base is not None
        return StepMetrics(
            step=number,
            loss=sums.distill + self.options.base_kl_weight * sums.anchor,
            distill_loss=sums.distill,
            anchor_loss=sums.anchor if anchored else math.nan,
            gap=sums.gap / self.tokens,
            base_kl=sums.base_kl / self.tokens if anchored else math.nan,
            peak_gap=sums.peak_gap / len(self.live),
            mean_ratio=sums.ratio / sums.weight,
            max_ratio=sums.max_ratio,
            clip_fraction=sums.clipped / sums.weight,
            entropy=sums.entropy / self.tokens,
            grad_norm=norm,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            response_tokens=self.tokens,
            seconds=seconds,
            outcome=outcome,
        )

    def _watch(self, metrics: StepMetrics) -> None:
        """Notice a loss computed from stale state: the weights moved and nothing else did."""
        if not self.history or self.history[-1].outcome != "updated" or metrics.grad_norm == 0.0:
            return
        last = self.history[-1]
        if (metrics.loss, metrics.grad_norm, metrics.entropy) == (last.loss, last.grad_norm, last.entropy):
            self.warnings.append(
                f"steps {last.step} and {metrics.step} have bit-identical loss, gradient norm and entropy although the "
                "weights were updated between them"
            )
