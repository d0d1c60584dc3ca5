"""AdamW over the adapter, its state carried from version to version by parameter NAME and without pickle.

Hyperparameters always come from the options of the batch at hand: a restored state holds moments and step counts,
never a learning rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sdpo_core.errors import AdapterError
from sdpo_core.given import a_policy, a_record
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.saved import SavedMoments

MOMENTS_FILE = "optimizer.safetensors"
META_FILE = "optimizer.json"
_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(policy: Policy, options: Options) -> AdamW:
    """A fresh AdamW over `policy.trainable()`. Raises OptionError for what is no policy or no options."""
    a_policy(policy)
    a_record("options", options, Options)
    return AdamW(
        [parameter for _, parameter in policy.trainable()],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def use_optimizer(policy: Policy, optimizer: Optimizer, options: Options) -> None:
    """Make ready for a batch: what `options` names (rate, and betas, eps and decay where the optimizer has them) is so.

    Raises AdapterError `foreign_optimizer` when it is not over the policy's own parameters, all of them and no others:
    it would train another adapter, or nothing.
    """
    if not isinstance(optimizer, Optimizer):
        raise _foreign(f"the optimizer is a {type(optimizer).__name__}: make it for this policy with make_optimizer")
    named = policy.trainable()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for _, parameter in named}:
        raise _foreign("the optimizer is of another adapter: make it for this policy with make_optimizer")
    wanted = {
        "lr": options.learning_rate, "betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay,
    }  # fmt: skip
    for group in optimizer.param_groups:
        group.update({name: value for name, value in wanted.items() if name in group})


def save_optimizer(policy: Policy, optimizer: AdamW, directory: Path | str) -> None:
    """Write moments (safetensors) and step counts (JSON) of every parameter that has been stepped."""
    state = optimizer_state(policy, optimizer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(state.tensors), directory / MOMENTS_FILE)
    meta = {"format": _FORMAT, "algorithm": "adamw", "steps": state.steps}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")


def optimizer_state(policy: Policy, optimizer: AdamW) -> SavedMoments:
    """What `save_optimizer` writes. On a CPU the tensors are the optimizer's own: take it when it is done."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter in policy.trainable():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        steps[name] = int(state["step"])
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = state[moment].detach().cpu().contiguous()
    return SavedMoments(steps, tensors)


def load_optimizer(policy: Policy, options: Options, saved: Path | str | SavedMoments) -> AdamW:
    """AdamW with the moments saved in a directory, or in memory, and the hyperparameters of `options`.

    Raises AdapterError when files are missing, a name or shape does not match this adapter, or values are not AdamW's.
    """
    state = saved if isinstance(saved, SavedMoments) else _read(Path(saved))
    optimizer = make_optimizer(policy, options)
    named = dict(policy.trainable())
    for name in state.steps:
        if name not in named:
            raise _foreign(f"the saved optimizer state has a parameter '{name}' that this adapter lacks")
    for name, count in state.steps.items():
        parameter = named[name]
        moments = {m: _moment(state.tensors, f"{m}.{name}", parameter) for m in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(count)), **moments}
    return optimizer


def _read(directory: Path) -> SavedMoments:
    try:
        meta = json.loads((directory / META_FILE).read_text())
        tensors = load_file(directory / MOMENTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise _foreign(f"no readable optimizer state in {directory}: {error}") from error
    known = isinstance(meta, dict) and meta.get("format") == _FORMAT and meta.get("algorithm") == "adamw"
    if not known or not isinstance(meta.get("steps"), dict):
        raise _foreign(f"the optimizer state in {directory} has an unknown format")
    for name, count in meta["steps"].items():
        if type(count) is not int or count < 1:
            raise _foreign(f"the saved optimizer state counts {count!r} steps of '{name}'")
    return SavedMoments(dict(meta["steps"]), tensors)


def _moment(tensors: Mapping[str, Tensor], key: str, parameter: Tensor) -> Tensor:
    value = tensors.get(key)
    if value is None or value.shape != parameter.shape:
        raise _foreign(f"the saved optimizer state '{key}' is missing or has another shape than the adapter")
    if not bool(torch.isfinite(value).all()):
        raise _foreign(f"the saved optimizer state '{key}' holds values that are not finite")
    if key.startswith("exp_avg_sq.") and bool((value < 0).any()):
        raise _foreign(f"the saved optimizer state '{key}' holds means of squares below 0")
    return value.to(device=parameter.device, dtype=parameter.dtype, copy=True)  # steps write into it


def _foreign(message: str) -> AdapterError:
    return AdapterError(message, code="foreign_optimizer")
