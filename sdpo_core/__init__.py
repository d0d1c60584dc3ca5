"""Self-distillation policy optimisation as a library: one batch of feedback in, a better LoRA adapter out.

The teacher is the same model told the feedback; the student, the adapter, is not told and learns to answer as if it
were. docs/algorithm.md has the formulas and a complete example.
"""

from sdpo_core.errors import AdapterError, ContextTooLong, OptionError, SampleError, SdpoError
from sdpo_core.loop import BatchResult, SampleOutcome, StepMetrics, train_batch
from sdpo_core.lora import LoraPolicy, LoraSpec, attach_lora, attached, detach, load_lora, save_lora
from sdpo_core.optimizer import load_optimizer, make_optimizer, save_optimizer
from sdpo_core.options import PRESETS, Options, claas, lasgroup
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample, TokenBatch

__all__ = [
    "PRESETS", "AdapterError", "BatchResult", "ContextTooLong", "LoraPolicy", "LoraSpec", "OptionError", "Options",
    "Policy", "Sample", "SampleError", "SampleOutcome", "SdpoError", "StepMetrics", "TokenBatch", "attach_lora",
    "attached", "claas", "detach", "lasgroup", "load_lora", "load_optimizer", "make_optimizer", "save_lora",
    "save_optimizer", "train_batch",
]  # fmt: skip
