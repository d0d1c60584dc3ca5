"""The base model that a training process keeps resident: weights, tokenizer, window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.settings import Device, Dtype


@dataclass(frozen=True)
class BaseModel:
    """Frozen weights that every job borrows and gives back bit-identical."""

    name: str
    module: nn.Module
    tokenizer: Any
    """A transformers tokenizer with a chat template."""
    window: int
    """Most positions of one sequence, prompt and response together."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def load_base(directory: Path, name: str, device: Device, dtype: Dtype) -> BaseModel:
    """Load from local files only; code that a model directory brings along is never run. Raises OSError, ValueError."""
    place = _device(device)
    module: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=_dtype(dtype, place), local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {directory} has no chat template")
    config: Any = module.config
    module.requires_grad_(False)
    return BaseModel(name, module.to(place).eval(), tokenizer, int(config.max_position_embeddings))


def _device(wanted: Device) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def _dtype(wanted: Dtype, place: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
