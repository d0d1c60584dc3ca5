"""A LoRA adapter on a resident base model: attach, load, save, detach, and score with it on or off.

The base stays in memory between jobs and must come back bit-identical. One adapter is attached at a time; `attached`
is a context manager so that no path out of a job leaves one behind.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sdpo_core.errors import AdapterError, OptionError
from sdpo_core.given import a_record, whole
from sdpo_core.lora_policy import LoraPolicy
from sdpo_core.saved import SavedLora
from sdpo_core.seal import BaseSeal, seal_of
from sdpo_core.undo import undone_on_error

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

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("alpha", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if self.target_modules is None:
            return
        names: Any = self.target_modules
        if not isinstance(names, tuple | list) or not names or not all(isinstance(n, str) for n in names):
            raise OptionError("target_modules", "must be a tuple of layer names such as ('q_proj',), or None")
        object.__setattr__(self, "target_modules", tuple(names))


def attach_lora(base: nn.Module, spec: LoraSpec, obstacle: str | None = None) -> LoraPolicy:
    """Put a fresh adapter on `base` (in place). The global random state is left as it was. `obstacle`: what
    `fast.decoder.obstacle_in(base)` says, where it is known already; None = tried when it matters.

    Raises AdapterError, `base` left as it was: it carries an adapter already, is no causal language model of
    Transformers, gives no finite logits, or lacks one of the layers.
    """
    a_record("spec", spec, LoraSpec)
    _refuse_unfit(base)
    targets = list(spec.target_modules or linear_names(base))
    _refuse_unknown(base, targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with undone_on_error(base), torch.random.fork_rng():
        seal = _seal(base)
        torch.manual_seed(spec.seed)
        try:
            return LoraPolicy(_wrap(base, config), seal, obstacle)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise AdapterError(f"no adapter on {', '.join(targets)}: {error}", code="unsupported_base") from error


def linear_names(base: nn.Module) -> list[str]:
    """Last name parts of all linear layers (GPT-2's Conv1D is one) except the output head, sorted."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    layers = (nn.Linear, Conv1D)
    return sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, layers) and m is not head})


def load_lora(base: nn.Module, saved: Path | str | SavedLora, obstacle: str | None = None) -> LoraPolicy:
    """Put a saved adapter (a PEFT directory, or `lora_state`) on `base`, trainable. `obstacle` as in `attach_lora`.

    Raises AdapterError, `base` left as it was, for a base as in `attach_lora`, and when what was saved is not a LoRA
    adapter of this base (missing or unexpected keys, shapes, values that are not finite, unreadable files).
    """
    where = "memory" if isinstance(saved, SavedLora) else str(saved)
    _refuse_unfit(base)
    if not isinstance(saved, SavedLora) and not (Path(saved) / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{saved} holds no {WEIGHTS_FILE}")
    with undone_on_error(base):
        seal = _seal(base)
        try:
            config = _config_of(saved)
            _refuse_kind(config, where)
            model = _wrap(base, config)
            weights = saved.weights if isinstance(saved, SavedLora) else load_peft_weights(str(saved), device="cpu")
            _fill(model, weights, where)
        except AdapterError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise AdapterError(f"{where} is not a LoRA adapter of this base: {error}") from error
        return LoraPolicy(model, seal, obstacle)


def _config_of(saved: Path | str | SavedLora) -> Any:
    if isinstance(saved, SavedLora):
        return PeftConfig.from_peft_type(**saved.config)
    return PeftConfig.from_pretrained(str(saved))


def _wrap(base: nn.Module, config: PeftConfig) -> PeftModel:
    config.inference_mode = False  # a saved adapter says True; here it is loaded to be trained
    config.base_model_name_or_path = None  # the caller vouches for the base; peft would warn of another spelling
    base.requires_grad_(False)
    with warnings.catch_warnings():
        # GPT-2's layers hold their weights transposed; peft sees it and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config)


def _fill(model: PeftModel, weights: Mapping[str, torch.Tensor], where: str) -> None:
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))[:3]
        raise AdapterError(f"the adapter in {where} has other keys than this base: {', '.join(odd)}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise AdapterError(f"'{key}' has shape {tuple(value.shape)}, this base needs {tuple(expected[key].shape)}")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"'{key}' holds values that are not finite")
    set_peft_model_state_dict(model, dict(weights))  # copies


def detach(policy: LoraPolicy) -> nn.Module:
    """Take the adapter off and give back the base model, bit-identical to what it was."""
    return policy.detach()


@contextmanager
def attached(
    base: nn.Module, source: LoraSpec | Path | str | SavedLora, obstacle: str | None = None
) -> Iterator[LoraPolicy]:
    """A fresh (LoraSpec) or saved (directory, `lora_state`) adapter on `base` for the length of a `with` block.
    `obstacle` as in `attach_lora`.

    Raises AdapterError at the end of a block that left the base changed: the next job would train on another model.
    """
    put_on = partial(attach_lora, base, source) if isinstance(source, LoraSpec) else partial(load_lora, base, source)
    policy = put_on(obstacle)
    try:
        yield policy
    finally:
        detach(policy)
    if not policy.base_unchanged(base):
        raise AdapterError(
            "the base model changed while the adapter was attached: load it anew before the next job",
            code="base_changed",
        )


def save_lora(policy: LoraPolicy, directory: Path | str, *, base_model_name_or_path: str) -> None:
    """Write the adapter as a PEFT directory: adapter_config.json and adapter_model.safetensors (CPU tensors).

    `base_model_name_or_path` is what PEFT and vLLM will read as the adapter's base.
    Raises AdapterError `adapter_detached` after `detach`, or behind `with attached`: there is nothing left to save.
    """
    state = lora_state(policy, base_model_name_or_path)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(state.weights), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(state.config, indent=2, sort_keys=True) + "\n")


def lora_state(policy: LoraPolicy, base_model_name_or_path: str) -> SavedLora:
    """What `save_lora` writes. On a CPU the tensors are the adapter's own, so take it when the training is over.
    Raises AdapterError `adapter_detached`."""
    policy.check_attached()
    state = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return SavedLora(_plain_config(policy.model.peft_config["default"], base_model_name_or_path), tensors)


def _plain_config(config: Any, base_name: str) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    values["base_model_name_or_path"] = base_name
    values["inference_mode"] = True
    values["auto_mapping"] = None
    return {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}


def _refuse_unfit(base: Any) -> None:
    """Raises AdapterError for what no adapter can be put on, before anything is touched."""
    if not isinstance(base, nn.Module):
        message = f"the base is a {type(base).__name__}, no model: load it with AutoModelForCausalLM"
        raise AdapterError(message, code="unsupported_base")
    if isinstance(base, PeftModel) or any(".lora_A" in name or ".lora_B" in name for name, _ in base.named_modules()):
        raise AdapterError("the base model still carries an adapter: detach it first", code="second_adapter")
    if not isinstance(base, PreTrainedModel):
        said = f"the base is a {type(base).__name__}, no model of Transformers"
    elif getattr(base.config, "is_encoder_decoder", False) or base.get_output_embeddings() is None:
        said = f"{type(base).__name__} is no causal language model with an output head"
    else:
        return
    raise AdapterError(f"{said}: load it with AutoModelForCausalLM", code="unsupported_base")


def _refuse_unknown(base: nn.Module, targets: list[str]) -> None:
    """PEFT itself is content with one of them."""
    names = [name for name, _ in base.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise AdapterError(f"the base model has no layer {target!r}", code="unknown_module")
    if not targets:
        raise AdapterError("the base model has no linear layer to adapt", code="unsupported_base")


def _refuse_kind(config: Any, where: str) -> None:
    """Raises AdapterError for adapters that reach into the base's own weights, or are more than two factors."""
    if config.peft_type != PeftType.LORA:
        raise AdapterError(f"{where} holds a {config.peft_type} adapter, no LoRA")
    plain = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
    odd = [name for name, known in plain.items() if getattr(config, name) not in known]
    odd += [name for name in ("modules_to_save", "use_dora", "lora_bias", "layer_replication") if getattr(config, name)]
    if odd:
        raise AdapterError(f"the adapter in {where} is no plain LoRA: its {odd[0]} is {getattr(config, odd[0])!r}")


def _seal(base: nn.Module) -> BaseSeal:
    """Raises AdapterError for a base that would only teach nan."""
    try:
        seal = seal_of(base)
    except (TypeError, AttributeError, IndexError) as error:
        raise AdapterError(f"the base model gives no logits for token ids: {error}", code="unsupported_base") from error
    if bool((seal.answers.isnan() | (seal.answers == torch.inf)).any()):
        raise AdapterError("the base model's logits are not finite: its weights are damaged", code="base_not_finite")
    return seal
