"""Self-distillation policy optimisation as a library: one batch of feedback in, a better LoRA adapter out.

The teacher is the same model told the feedback; the student, the adapter, is not told and learns to answer as if it
were. docs/algorithm.md has the formulas and a complete example.
"""

from sdpo_core.ahead import anchor_scores, teacher_targets
from sdpo_core.bare import BarePolicy
from sdpo_core.chat import chat_ids
from sdpo_core.divergence import Target
from sdpo_core.ema import EmaTeacher, load_ema, make_ema, save_ema
from sdpo_core.errors import (
    AdapterError,
    ContextTooLong,
    OptionError,
    RemarkError,
    SampleError,
    SdpoError,
    TargetError,
)
from sdpo_core.explain import Explanation, explain
from sdpo_core.hearing import Probe
from sdpo_core.identity import AnchorScore, TeacherTarget
from sdpo_core.loop import train_batch
from sdpo_core.lora import LoraPolicy, LoraSpec, attach_lora, attached, detach, load_lora, save_lora
from sdpo_core.optimizer import load_optimizer, make_optimizer, save_optimizer
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.presets import PRESETS, claas, lasgroup
from sdpo_core.report import Audit, BatchResult, BatchWarning, SampleOutcome, StepMetrics, StepPlan
from sdpo_core.rollouts import learnt_from
from sdpo_core.samples import Sample, TokenBatch
from sdpo_core.signals import PolicyGradient
from sdpo_core.standing import Standing, update_standing
from sdpo_core.teacher_context import ContextTemplate, teacher_messages, usable_remarks
from sdpo_core.teacher_prompt import TeacherPrompt, teacher_prompt
from sdpo_core.withdraw import withdraw
from sdpo_core.writing import teacher_written

__all__ = [
    "PRESETS", "AdapterError", "AnchorScore", "Audit", "BarePolicy", "BatchResult", "BatchWarning",
    "ContextTemplate", "ContextTooLong", "EmaTeacher", "Explanation", "LoraPolicy", "LoraSpec", "OptionError",
    "Options", "Policy", "PolicyGradient", "Probe", "RemarkError", "Sample", "SampleError", "SampleOutcome",
    "SdpoError", "Standing", "StepMetrics", "StepPlan", "Target", "TargetError", "TeacherPrompt", "TeacherTarget",
    "TokenBatch", "anchor_scores", "attach_lora", "attached", "chat_ids", "claas", "detach", "explain", "lasgroup",
    "learnt_from", "load_ema", "load_lora", "load_optimizer", "make_ema", "make_optimizer", "save_ema", "save_lora",
    "save_optimizer", "teacher_messages", "teacher_prompt", "teacher_targets", "teacher_written", "train_batch",
    "update_standing", "usable_remarks", "withdraw",
]  # fmt: skip
