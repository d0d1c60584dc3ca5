"""AdamW over the adapter, its state carried from version to version by parameter NAME and without pickle.

Hyperparameters always come from the options of the batch at hand: a restored state holds moments and step counts,
never a learning rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from sdpo_core.errors import AdapterError
from sdpo_core.options import Options
from sdpo_core.policy import Policy

MOMENTS_FILE = "optimizer.safetensors"
META_FILE = "optimizer.json"
_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(policy: Policy, options: Options) -> AdamW:
    """A fresh AdamW over `policy.trainable()`."""
    return AdamW(
        [parameter for _, parameter in policy.trainable()],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def save_optimizer(policy: Policy, optimizer: AdamW, directory: Path) -> None:
    """Write moments (safetensors) and step counts (JSON) of every parameter that has been stepped."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter in policy.trainable():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        steps[name] = int(state["step"])
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = state[moment].detach().cpu().contiguous()
    save_file(tensors, directory / MOMENTS_FILE)
    meta = {"format": _FORMAT, "algorithm": "adamw", "steps": steps}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")


def load_optimizer(policy: Policy, options: Options, directory: Path) -> AdamW:
    """AdamW with the moments saved in `directory` and the hyperparameters of `options`.

    Raises AdapterError when files are missing or a name or shape does not match this adapter.
    """
    steps, tensors = _read(directory)
    optimizer = make_optimizer(policy, options)
    named = dict(policy.trainable())
    for name in steps:
        if name not in named:
            raise AdapterError(f"the saved optimizer state has a parameter '{name}' that this adapter lacks")
    for name, count in steps.items():
        parameter = named[name]
        moments = {m: _moment(tensors, f"{m}.{name}", parameter) for m in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(count)), **moments}
    return optimizer


def _read(directory: Path) -> tuple[dict[str, int], Mapping[str, Tensor]]:
    try:
        meta = json.loads((directory / META_FILE).read_text())
        tensors = load_file(directory / MOMENTS_FILE)
    except (OSError, ValueError) as error:
        raise AdapterError(f"no readable optimizer state in {directory}: {error}") from error
    if meta.get("format") != _FORMAT or meta.get("algorithm") != "adamw":
        raise AdapterError(f"the optimizer state in {directory} has an unknown format")
    return {str(k): int(v) for k, v in meta["steps"].items()}, tensors


def _moment(tensors: Mapping[str, Tensor], key: str, parameter: Tensor) -> Tensor:
    value = tensors.get(key)
    if value is None or value.shape != parameter.shape:
        raise AdapterError(f"the saved optimizer state '{key}' is missing or has another shape than the adapter")
    return value.to(device=parameter.device, dtype=parameter.dtype)
