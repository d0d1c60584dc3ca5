"""Step metrics on the wire: nothing that is no number, and how the step was computed."""

from __future__ import annotations

import math

from api_schemas.jobs import StepMetrics as WireMetrics
from api_schemas.training import TrainingSettings, resolve
from sdpo_core.report import Audit, StepMetrics, StepPlan
from worker.mapping import options_of, wire_metrics

STEP = StepMetrics(
    step=1, loss=0.5, distill_loss=0.5, anchor_loss=math.nan, previous_anchor_loss=math.nan, gap=0.2, base_kl=math.nan,
    peak_gap=1.0, mean_ratio=1.0, max_ratio=1.5, clip_fraction=0.0, entropy=2.0, grad_norm=0.3, learning_rate=1e-4,
    response_tokens=9, seconds=0.1, outcome="updated", path="fast",
    plan=StepPlan(micro_batch_tokens=512, chunk_tokens=None, checkpointing=True, micro_batches=3, compiled=True),
    audit=Audit(loss=1e-7, tokens=math.nan, gradient=2e-6, teacher=0.0),
)  # fmt: skip


def test_path_plan_and_audit_arrive() -> None:
    wire = WireMetrics.model_validate_json(wire_metrics(STEP).model_dump_json())
    assert (wire.path, wire.fallback_reason, wire.outcome) == ("fast", None, "updated")
    assert wire.plan is not None
    assert (wire.plan.micro_batch_tokens, wire.plan.micro_batches, wire.plan.checkpointing) == (512, 3, True)
    assert wire.plan.compiled
    assert wire.audit is not None
    assert (wire.audit.gradient, wire.audit.tokens) == (2e-6, None)
    assert wire.base_kl is None


def test_a_skipped_step_has_no_loss() -> None:
    skipped = StepMetrics(**{**vars(STEP), "loss": math.nan, "grad_norm": math.inf, "outcome": "non_finite"})
    wire = WireMetrics.model_validate_json(wire_metrics(skipped).model_dump_json())
    assert (wire.loss, wire.grad_norm, wire.outcome) == (None, None, "non_finite")


def test_how_it_is_computed_can_be_set() -> None:
    chosen = options_of(resolve(TrainingSettings(path="plain", audit=True, measure_base_kl=False)))
    assert (chosen.path, chosen.audit, chosen.measure_base_kl) == ("plain", True, False)
    usual = options_of(resolve(TrainingSettings()))
    assert (usual.path, usual.audit, usual.measure_base_kl) == ("auto", False, True)
