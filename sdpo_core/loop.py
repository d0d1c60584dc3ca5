"""One batch of feedback through the student: the training loop.

Read top to bottom: score the teacher once, then per step forward and backward every micro-batch with the whole
batch's denominators, look at the gap, clip, update. Nothing here knows what a model is (sdpo_core.policy) or where
samples come from. What is scored beforehand is in sdpo_core.scoring, what is reported in sdpo_core.report.

On the ratio: without `refresh` it stays pi_now / pi_rollout. With `refresh` the weights after each step are declared
the behaviour policy, so from step 2 on the ratio is 1. That switches the correction off; it does not correct.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdpo_core.aggregation import row_weights
from sdpo_core.ahead import live_anchors, live_targets
from sdpo_core.batch_checks import taught_parts
from sdpo_core.divergence import Target
from sdpo_core.ema import DeltaPolicy, EmaTeacher
from sdpo_core.identity import AnchorScore, TeacherTarget
from sdpo_core.optimizer import use_optimizer
from sdpo_core.options import Options
from sdpo_core.path_choice import Route, choose
from sdpo_core.paths import Part, Path
from sdpo_core.policy import Policy
from sdpo_core.ranks import LONE, Ranks, any_rank, total
from sdpo_core.report import (
    BatchResult,
    Outcome,
    StepMetrics,
    StepPlan,
    StopReason,
    Sums,
    Watch,
    cautioned,
    sample_outcome,
)
from sdpo_core.samples import Sample, pad_rows
from sdpo_core.scoring import BaseScore, Fixed, score_fixed
from sdpo_core.sharing import SharedScorer


@runtime_checkable
class Sealed(Protocol):
    """A policy that can tell whether its base is still the bare model that it was attached to."""

    def base_intact(self) -> bool: ...


def train_batch(
    policy: Policy,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    options: Options,
    *,
    ema: EmaTeacher | None = None,
    targets: Sequence[TeacherTarget] | None = None,
    anchors: Sequence[AnchorScore] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks = LONE,
) -> BatchResult:
    """Train the policy's adapter on one batch, in place. Deterministic on CPU.

    `optimizer` comes from `make_optimizer` / `load_optimizer`, over `policy.trainable()`; its rate, and betas, eps and
    weight decay where it has them, are set to those of `options`. `ema`, for teacher `ema`, is moved once, after the
    batch and only if weights moved. `targets` are the teacher's, one per sample, where `teacher_targets` has scored
    them before; `anchors` are the base's, likewise, where `anchor_scores` has. `on_step` is called after each step;
    `should_stop` is asked before each (true: stop, keeping the updates made so far). `ranks`: several processes that
    share the batch, each called with the same (sdpo_core.ranks); one that is told to stop stops them all.

    Raises before anything is trained: OptionError when teacher `ema` lacks its state or targets are given for teacher
    `live`; AdapterError for an optimizer of another adapter; TargetError for targets or anchors of other samples,
    options, teachers or bases; ContextTooLong, SampleError for samples that the model cannot read.
    """
    samples = taught_parts(policy, samples, options)
    outcomes = tuple(sample_outcome(s) for s in samples)
    live = [s for s in samples if s.live]
    use_optimizer(policy, optimizer, options)
    route = choose(policy, options, ema)
    known = live_targets(policy, samples, targets, options, ema)
    scored = live_anchors(policy, samples, anchors)
    if not live:
        return BatchResult((), outcomes, "nothing_to_teach", cautioned(options.cautions))
    run = _Run(route, optimizer, live, _live_weights(samples, options), ema, known, scored, ranks)
    stop_reason: StopReason = "steps"
    for number in range(1, options.steps + 1):
        if any_rank(ranks, should_stop is not None and should_stop()):
            stop_reason = "cancelled"
            break
        metrics = run.step(number)
        if on_step is not None:
            on_step(metrics)
        if metrics.outcome == "gap_closed":
            stop_reason = "gap_closed"
            break
    run.check_base()
    run.move_teacher()
    return BatchResult(tuple(run.history), outcomes, stop_reason, (*cautioned(options.cautions), *run.watch.warnings))


def _live_weights(samples: Sequence[Sample], options: Options) -> list[float]:
    """Row weights of the live samples. Dead ones count as rows of no tokens, which one mode keeps in its mean."""
    lengths = [len(s.response_ids) if s.live else 0 for s in samples]
    weights = row_weights(lengths, options.aggregation)
    return [w for w, s in zip(weights, samples, strict=True) if s.live]


def _has_stepped(optimizer: Optimizer) -> bool:
    return any(float(state.get("step", 0)) > 0 for state in optimizer.state.values())


@dataclass
class _Run:
    """The state of one batch: live samples, what is fixed, the current behaviour log-probs, the history."""

    route: Route
    optimizer: Optimizer
    live: list[Sample]
    weights: list[float]
    ema: EmaTeacher | None
    targets: list[Target]
    """Empty: to be scored."""
    anchors: list[BaseScore] | None = None
    """None: to be scored."""
    ranks: Ranks = LONE
    shared: SharedScorer = field(init=False)
    fixed: Fixed = field(init=False)
    behaviour: list[Tensor | None] = field(init=False)
    """Per sample; None = take the student's own at the next forward pass."""
    history: list[StepMetrics] = field(default_factory=list)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.policy = self.route.path.policy
        self.tokens = sum(len(s.response_ids) for s in self.live)
        self.shared = SharedScorer(self.route, self.ranks, self.live)
        self.fixed = score_fixed(self.shared, self.live, self.anchors)
        if not self.targets:
            self.targets = self.shared.targets()
        self.behaviour = [self._first_behaviour(i) for i in range(len(self.live))]
        self.watch = Watch(trained_before=_has_stepped(self.optimizer))

    @property
    def options(self) -> Options:
        """Those of the batch, with less at a time once memory has run out."""
        return self.route.path.options

    def _first_behaviour(self, i: int) -> Tensor | None:
        """Recorded log-probs; with rollout correction those of the starting weights, whose weights cover the rest."""
        recorded = self.live[i].behaviour_logprobs
        if recorded is None:
            return None
        if self.options.rollout_correction != "none" and self.fixed.start is not None:
            return self.fixed.start[i].logp
        return torch.tensor(recorded, device=self.policy.device)

    def step(self, number: int) -> StepMetrics:
        """One forward and backward over the batch, then the update unless there is a reason not to."""
        started = time.perf_counter()
        if self.options.teacher == "live" and self.history and self.history[-1].outcome == "updated":
            self.targets = self.shared.targets()
        sums = total(self.ranks.gathered(self.shared.tried(self._accumulate, self.shared.own)))
        parameters = [p for _, p in self.policy.trainable()]
        self.ranks.sum_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm))
        outcome = self._decide(sums.peak_gap / len(self.live), norm)
        if outcome == "updated":
            self._update()
        metrics = self._metrics(number, sums, norm, outcome, time.perf_counter() - started)
        self.watch.step(metrics, self.history[-1] if self.history else None)
        self.history.append(metrics)
        return metrics

    def _accumulate(self, path: Path) -> Sums:
        """Forward and backward of this rank's micro-batches; their gradient is in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        fillers = self.shared.fillers(path)  # asked before the first forward pass, which is a common act as well
        for rows in self.shared.groups(path):
            part = self._part(rows)
            terms = path.backward(part)
            self._remember(rows, terms.logp)
            mask_BT = pad_rows([torch.ones(len(s.response_ids), device=terms.logp.device) for s in part.samples]) > 0
            sums.add(terms, mask_BT, torch.tensor(part.weights, device=terms.logp.device), self.options.is_clip)
        for rows in fillers:
            path.backward(replace(self._part(rows), weights=[0.0] * len(rows)))
        return sums

    def _part(self, rows: list[int]) -> Part:
        fixed = self.fixed
        return Part(
            samples=[self.live[r] for r in rows],
            targets=[self.targets[r] for r in rows],
            weights=[self.weights[r] for r in rows],
            behaviour=[self.behaviour[r] for r in rows],
            base=None if fixed.base is None else [fixed.base[r] for r in rows],
            start=None if fixed.start is None else [fixed.start[r] for r in rows],
            token_weights=None if fixed.token_weights is None else [fixed.token_weights[r] for r in rows],
        )

    def _remember(self, rows: list[int], logp_BT: Tensor) -> None:
        """Student log-probs that just stood in for unknown ones are the behaviour log-probs from here on, but for
        answers that the teacher wrote: those have none."""
        for b, r in enumerate(rows):
            if self.behaviour[r] is None and not self.live[r].teacher_written:
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

    def move_teacher(self) -> None:
        """The moving average follows once per batch, and only weights that a finite gradient has moved."""
        ema, policy = self.ema, self.policy
        if self.options.teacher != "ema" or ema is None or not isinstance(policy, DeltaPolicy):
            return
        if not any(m.outcome == "updated" for m in self.history):
            return
        ema.update(policy, self.options.teacher_rate, self.options.teacher_rank)
        if ema.lost > 0.01:
            message = f"the rank bound cut {ema.lost:.1%} off the moving average: raise teacher_rank"
            self.watch.warn("teacher_truncated", message)

    def check_base(self) -> None:
        """Once, when the batch is trained: a reading of every weight costs as much as some steps of a small batch."""
        if isinstance(self.policy, Sealed) and not self.policy.base_intact():
            message = "the base model without the adapter is not what it was when the adapter was attached"
            self.watch.warn("base_changed", message)

    def _metrics(self, number: int, sums: Sums, norm: float, outcome: Outcome, seconds: float) -> StepMetrics:
        anchored, started = self.fixed.base is not None, self.fixed.start is not None
        loss = sums.distill + self.options.base_kl_weight * sums.anchor
        return StepMetrics(
            step=number,
            loss=loss + self.options.previous_kl_weight * sums.previous_anchor,
            distill_loss=sums.distill,
            anchor_loss=sums.anchor if anchored else math.nan,
            previous_anchor_loss=sums.previous_anchor if started else math.nan,
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
            path=self.route.path.name,
            fallback_reason=self.route.fallback_reason,
            plan=self._plan(),
            audit=self.route.audit(),
            teacher_written=sum(s.teacher_written for s in self.live),
        )

    def _plan(self) -> StepPlan:
        o = self.options
        groups, fast = len(self.shared.groups(self.route.path)), self.route.path.name == "fast"
        return StepPlan(o.micro_batch_tokens, o.chunk_tokens, o.checkpointing, groups, o.compile_layers and fast)
