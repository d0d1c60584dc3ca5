"""The base model that a training process keeps resident: weights, tokenizer, window."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from sdpo_core.bare import BarePolicy
from sdpo_core.fast.decoder import obstacle_in
from sdpo_core.fast.prefixes import reads_on
from sdpo_core.ranks import LONE, Ranks
from sdpo_core.sharded import shard_base
from worker.memory import ModelShape, Quantise, read_shape
from worker.settings import Device, Dtype
from worker.warm import WarmVersions


@dataclass(frozen=True)
class BaseModel:
    """Frozen weights that every job borrows and gives back bit-identical."""

    name: str
    module: nn.Module
    tokenizer: Any
    """A transformers tokenizer with a chat template."""
    window: int
    """Most positions of one sequence, prompt and response together."""

    batch_tokens: int = 8192
    """Most tokens of one micro-batch."""
    compile_layers: bool = False
    """Whether the fast path's passes go through torch.compile."""
    ranks: Ranks = LONE
    """Who trains together with this process."""
    shape: ModelShape | None = None
    """For plans by the memory that is free; None where the model is of an unknown form."""
    canaries: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Canary prompts with the base's continuation (worker.canary): the same for every job."""
    warm: WarmVersions = field(default_factory=WarmVersions, compare=False)
    """What was trained on it of late; none unless told how much may be kept."""

    @cached_property
    def fast_obstacle(self) -> str:
        """Why the fast path cannot take this model (sdpo_core.fast.decoder); empty when it can. Asked while bare."""
        if not isinstance(self.module, PreTrainedModel):
            return "no model of Transformers"
        return obstacle_in(self.module)

    def bare(self) -> BarePolicy:
        """The model as a policy without an adapter. Raises TypeError where it is no model of Transformers."""
        if not isinstance(self.module, PreTrainedModel):
            raise TypeError(f"the base model is a {type(self.module).__name__}, no model of Transformers")
        return BarePolicy(self.module, self.fast_obstacle, self._reads_on)

    @cached_property
    def _reads_on(self) -> bool:
        return isinstance(self.module, PreTrainedModel) and not self.fast_obstacle and reads_on(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def load_base(
    directory: Path, name: str, device: Device, dtype: Dtype, quantise: Quantise = "none", ranks: Ranks = LONE
) -> BaseModel:
    """Load from local files only; code that a model directory brings along is never run. Raises OSError, ValueError.

    `quantise` "4bit": the layers' matrices as NF4 through bitsandbytes (about 0.52 bytes per weight), everything else
    in `dtype`; ValueError without CUDA. `ranks` in lockstep: each holds its part of the weights.
    """
    place = _device(device)
    extra = _four_bit(place, _dtype(dtype, place)) if quantise == "4bit" else {}
    module: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=_dtype(dtype, place), local_files_only=True, trust_remote_code=False, use_safetensors=True,
        **extra,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {directory} has no chat template")
    config: Any = module.config
    module.requires_grad_(False)
    if ranks.lockstep:
        shard_base(module, place, ranks.size)
    elif not extra:  # quantised weights were put there as they were loaded
        module = module.to(place)
    window = int(config.max_position_embeddings)
    return BaseModel(name, module.eval(), tokenizer, window, shape=_shape(directory), ranks=ranks)


def _shape(directory: Path) -> ModelShape | None:
    try:
        return read_shape(directory)
    except (OSError, ValueError):
        return None


def _four_bit(place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told for 4-bit weights."""
    if place.type != "cuda":
        raise ValueError("quantise 4bit needs an NVIDIA GPU (CUDA)")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": place.index or 0}}


def _device(wanted: Device) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def _dtype(wanted: Dtype, place: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
