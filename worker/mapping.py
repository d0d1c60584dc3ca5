"""From the wire's settings to the algorithm's: the only place that knows both vocabularies."""

from __future__ import annotations

import math
from dataclasses import asdict

from api_schemas.jobs import StepAudit as WireAudit
from api_schemas.jobs import StepMetrics as WireMetrics
from api_schemas.jobs import StepPlan as WirePlan
from api_schemas.training import LoraSettings, ResolvedTraining
from sdpo_core.divergence import Support
from sdpo_core.errors import OptionError
from sdpo_core.lora import LoraSpec
from sdpo_core.options import Options
from sdpo_core.presets import PRESETS
from sdpo_core.report import StepMetrics
from worker.errors import TrainingFailedError

_SUPPORT: dict[str, Support] = {
    "teacher_topk": "teacher",
    "student_topk": "student",
    "full": "full",
    "sampled": "sampled",
}


def options_of(training: ResolvedTraining) -> Options:
    """The options of one job: those the wire names, over the preset's values for the rest.

    Raises TrainingFailedError `settings_refused` for a combination that the algorithm refuses.
    """
    exact = training.support == "sampled" and training.preset != "claas"
    try:
        return PRESETS[training.preset].replace(
            alpha=training.alpha,
            support=_SUPPORT[training.support],
            top_k=None if exact else training.top_k,  # the floor outside the top K is CLaaS's own
            outside=training.outside,
            is_clip=training.is_clip,
            steps=training.steps,
            refresh=training.refresh,
            base_kl_weight=training.base_kl_weight,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            measure_base_kl=training.measure_base_kl,
            path=training.path,
            audit=training.audit,
        )
    except OptionError as error:
        raise TrainingFailedError("settings_refused", str(error), retryable=False) from error


def lora_of(settings: LoraSettings, seed: int) -> LoraSpec:
    """A fresh adapter of the wanted shape. The seed makes it the same one on every retry."""
    return LoraSpec(rank=settings.rank, alpha=settings.alpha, target_modules=tuple(settings.target_modules), seed=seed)


def wire_metrics(step: StepMetrics) -> WireMetrics:
    """One step for the service. What was not measured is left out rather than sent as a number."""
    return WireMetrics(
        step=step.step,
        loss=_known(step.loss),
        gap=_known(step.gap),
        mean_is_ratio=_known(step.mean_ratio),
        max_is_ratio=_known(step.max_ratio),
        clip_fraction=_known(step.clip_fraction),
        base_kl=_known(step.base_kl),
        entropy=_known(step.entropy),
        grad_norm=_known(step.grad_norm),
        learning_rate=step.learning_rate,
        response_tokens=step.response_tokens,
        teacher_written=step.teacher_written,
        seconds=step.seconds,
        outcome=step.outcome,
        path=step.path,
        fallback_reason=step.fallback_reason or None,
        plan=None if step.plan is None else WirePlan(**asdict(step.plan)),
        audit=None if step.audit is None else WireAudit(**{k: _known(v) for k, v in asdict(step.audit).items()}),
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
