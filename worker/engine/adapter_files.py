"""Reads a PEFT LoRA directory into weights, refusing whatever would be served wrongly.

vLLM refuses missing or truncated weights, DoRA, trained biases, `modules_to_save` and a rank above its maximum. It does
not look at keys, shapes or values; here those are refused too. Only safetensors is read: a pickle can run code.

Shapes: I in-features, O out-features, R rank.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from worker.engine.errors import AdapterLoadError, NotFoundError
from worker.engine.lora import LoraWeights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options of PEFT's LoRA that change the forward pass in a way this engine does not compute.
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN_PATTERN = re.compile(r"[A-Za-z0-9_.]+")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraWeights:
    """The weights in the PEFT directory `path` for a base whose linear layers have the given (O, I) `shapes`.

    Raises:
        NotFoundError: the directory or its adapter_config.json is missing.
        AdapterLoadError: anything that makes the adapter unusable, named in the message.
    """
    config = read_config(path)
    modules = _pair_up(_read_tensors(path))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, (a_RI, b_OR) in modules.items():
        rank = _check_shapes(module, a_RI, b_OR, shapes)
        if rank > max_rank:
            raise AdapterLoadError(f"LoRA rank {rank} of {module} is greater than max_lora_rank {max_rank}.")
        scaling = scaling_of(config, module, rank)
        scaled_OR = b_OR.float() * scaling
        if not (torch.isfinite(a_RI).all() and torch.isfinite(scaled_OR).all()):
            raise AdapterLoadError(f"The adapter has a weight in {module} that is not a finite number.")
        # A copy: safetensors may hand out a view of the mapped file, which could change under a running request.
        pairs[module] = (a_RI.to(device, dtype, copy=True), scaled_OR.to(device, dtype))
    return LoraWeights(pairs)


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a directory, refused where it asks for something this engine does not compute."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise NotFoundError(f"No adapter found at this path: there is no {CONFIG_FILE} in it.", param="lora_path")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterLoadError(f"{CONFIG_FILE} is not valid JSON.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterLoadError(f"{CONFIG_FILE} does not describe a LoRA adapter (peft_type LORA).")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise AdapterLoadError(f"Adapters with {option} are not supported.")
    if config.get("bias", "none") != "none":
        raise AdapterLoadError("Adapters that train a bias are not supported; use bias: none.")
    for option in ("rank_pattern", "alpha_pattern"):
        _check_pattern(option, config.get(option) or {})
    return config


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), patterns applied.

    Raises AdapterLoadError where the configured rank is not the rank of the stored tensors.
    """
    declared = _from_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    alpha = _from_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if declared != rank:
        raise AdapterLoadError(f"{CONFIG_FILE} says rank {declared} for {module}, its tensors have rank {rank}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterLoadError(f"{CONFIG_FILE} has no usable lora_alpha for {module}.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_pattern(option: str, pattern: object) -> None:
    """PEFT takes regular expressions here; plain module names are enough, and cannot be made to run for ever."""
    if not isinstance(pattern, dict) or not all(_PLAIN_PATTERN.fullmatch(key) for key in pattern):
        raise AdapterLoadError(f"{option} must map plain module names to numbers; expressions are not supported.")


def _from_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is `module` or its last dotted parts (PEFT's rule), else the default."""
    return next((value for key, value in pattern.items() if f".{module}".endswith(f".{key}")), default)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise AdapterLoadError(f"The adapter has no {WEIGHTS_FILE}; only safetensors weights are read.")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterLoadError(f"{WEIGHTS_FILE} cannot be read: truncated or not safetensors.") from error
    return tensors


def _pair_up(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (a_RI, b_OR); every tensor must belong to a complete pair."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterLoadError(f"Unexpected tensor {key!r}: only lora_A and lora_B weights are supported.")
        if tensor.dtype not in _FLOATS:
            raise AdapterLoadError(f"Tensor {key!r} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterLoadError("The adapter has no weights.")
    incomplete = sorted(module for module, pair in sides.items() if len(pair) != 2)
    if incomplete:
        raise AdapterLoadError(f"Module {incomplete[0]} has only one of lora_A and lora_B.")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_shapes(module: str, a_RI: Tensor, b_OR: Tensor, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The rank of a pair that fits the base layer `module`; a misfit means another base model."""
    if module not in shapes:
        raise AdapterLoadError(f"The base model has no linear layer {module}: the adapter is for another model.")
    out_features, in_features = shapes[module]
    rank = a_RI.shape[0] if a_RI.ndim == 2 else 0
    if rank < 1 or tuple(a_RI.shape) != (rank, in_features) or tuple(b_OR.shape) != (out_features, rank):
        raise AdapterLoadError(
            f"Module {module} has lora_A {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)}; "
            f"the base layer needs (r, {in_features}) and ({out_features}, r)."
        )
    return rank
