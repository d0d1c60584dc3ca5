"""A LoRA adapter on a resident base model: attach, load, save, detach, and score with it on or off.

The base stays in memory between jobs and must come back bit-identical. One adapter is attached at a time; `attached`
is a context manager so that no path out of a job leaves one behind.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from sdpo_core.errors import AdapterError
from sdpo_core.lora_policy import LoraPolicy, seal_of

__all__ = ["LoraPolicy", "LoraSpec", "attach_lora", "attached", "detach", "linear_names", "load_lora", "save_lora"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """A fresh adapter."""

    rank: int = 8
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | None = None
    """Last name parts of the layers to adapt, such as "q_proj"; None = every linear layer but the output head."""
    seed: int = 0
    """Seeds the A factors; B starts at zero, so a fresh adapter is the base model."""


def attach_lora(base: nn.Module, spec: LoraSpec) -> LoraPolicy:
    """Put a fresh adapter on `base` (in place). The global random state is left as it was."""
    _refuse_second(base)
    base.requires_grad_(False)
    targets = list(spec.target_modules or linear_names(base))
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    seal = seal_of(base)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        return LoraPolicy(_wrap(base, config), seal)


def linear_names(base: nn.Module) -> list[str]:
    """Last name parts of all linear layers except the output head, sorted."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    linear = {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return sorted(linear)


def load_lora(base: nn.Module, directory: Path) -> LoraPolicy:
    """Put the adapter saved in `directory` (a PEFT directory) on `base`, trainable.

    Raises AdapterError when the directory is not a LoRA adapter of this base (missing or unexpected keys, shapes).
    """
    _refuse_second(base)
    base.requires_grad_(False)
    if not (directory / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{directory} holds no {WEIGHTS_FILE}")
    seal = seal_of(base)
    try:
        config = PeftConfig.from_pretrained(str(directory))
        model = _wrap(base, config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{directory} is not a LoRA adapter of this base: {error}") from error
    try:
        _fill(model, directory)
    except Exception:
        model.unload()
        raise
    return LoraPolicy(model, seal)


def _wrap(base: nn.Module, config: PeftConfig) -> PeftModel:
    config.inference_mode = False  # a saved adapter says True; here it is loaded to be trained
    config.base_model_name_or_path = None  # the caller vouches for the base; peft would warn of another spelling
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config)


def _fill(model: PeftModel, directory: Path) -> None:
    weights = load_peft_weights(str(directory), device="cpu")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))[:3]
        raise AdapterError(f"the adapter in {directory} has other keys than this base: {', '.join(odd)}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise AdapterError(f"'{key}' has shape {tuple(value.shape)}, this base needs {tuple(expected[key].shape)}")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"'{key}' holds values that are not finite")
    set_peft_model_state_dict(model, weights)


def detach(policy: LoraPolicy) -> nn.Module:
    """Take the adapter off and give back the base model, bit-identical to what it was."""
    base: nn.Module = policy.model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


@contextmanager
def attached(base: nn.Module, source: LoraSpec | Path) -> Iterator[LoraPolicy]:
    """A fresh (LoraSpec) or saved (directory) adapter on `base` for the length of a `with` block.

    Raises AdapterError at the end of a block that left the base changed: the next job would train on another model.
    """
    policy = attach_lora(base, source) if isinstance(source, LoraSpec) else load_lora(base, source)
    try:
        yield policy
    finally:
        detach(policy)
    if not policy.base_unchanged(base):
        raise AdapterError("the base model changed while the adapter was attached: load it anew before the next job")


def save_lora(policy: LoraPolicy, directory: Path, *, base_model_name_or_path: str) -> None:
    """Write the adapter as a PEFT directory: adapter_config.json and adapter_model.safetensors (CPU tensors).

    `base_model_name_or_path` is what PEFT and vLLM will read as the adapter's base.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _plain_config(policy.model.peft_config["default"], base_model_name_or_path)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _plain_config(config: Any, base_name: str) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    values["base_model_name_or_path"] = base_name
    values["inference_mode"] = True
    values["auto_mapping"] = None
    return {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}


def _refuse_second(base: nn.Module) -> None:
    if isinstance(base, PeftModel) or any(".lora_A" in name or ".lora_B" in name for name, _ in base.named_modules()):
        raise AdapterError("the base model still carries an adapter: detach it first")
