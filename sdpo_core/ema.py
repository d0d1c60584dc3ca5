"""The moving-average teacher of a LoRA adapter: an average of the MERGED deltas, never of the factors.

Averaging A and B apart is another thing: the product of two averages grows as (1 - (1 - rate)^n)^2. Here, per adapted
layer, delta <- (1 - rate) delta + rate * scale * B A, kept in float32 as thin factors of rank `max_rank` at most
(sdpo_core.lowrank): exact until the bound is reached, then truncated, with the share lost on record. A full matrix per
layer would cost as much memory as the base model. Source of the rule: lasgroup/SDPO dp_actor.py, per rollout batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdpo_core.errors import AdapterError
from sdpo_core.lowrank import LowRank, weighted_sum
from sdpo_core.policy import Policy
from sdpo_core.samples import TokenBatch

TENSORS_FILE = "teacher.safetensors"
META_FILE = "teacher.json"
_FORMAT = 1


@runtime_checkable
class DeltaPolicy(Policy, Protocol):
    """A policy whose adapter is a set of weight deltas and which can be scored under others."""

    def deltas(self) -> dict[str, LowRank]:
        """The adapter's merged delta per layer, float32 copies."""
        ...

    def delta_logits(self, batch: TokenBatch, deltas: Mapping[str, LowRank]) -> Tensor:
        """Logits of the base model with these deltas in the adapter's place; no gradient. Shape as `logits`."""
        ...


@dataclass
class EmaTeacher:
    """The average so far. It moves once per batch, after the batch, and only if weights moved."""

    deltas: dict[str, LowRank]
    updates: int = 0
    lost: float = 0.0
    """Largest share of a layer's delta (Frobenius norm) that the last update's rank bound cut off."""

    def on(self, device: torch.device | str) -> EmaTeacher:
        """The same elsewhere. Updates of either leave the other as it is: they make new deltas and write into none."""
        moved = {name: LowRank(d.left.to(device), d.right.to(device)) for name, d in self.deltas.items()}
        return replace(self, deltas=moved)

    def update(self, policy: DeltaPolicy, rate: float, max_rank: int) -> None:
        """One step of the average towards the policy's current adapter. `rate` 0 leaves it bit-equal."""
        if rate == 0.0:
            return
        current = policy.deltas()
        summed = {
            name: weighted_sum([(1.0 - rate, old), (rate, current[name])], max_rank)
            for name, old in self.deltas.items()
        }
        self.deltas = {name: s.delta for name, s in summed.items()}
        self.lost = max((s.lost for s in summed.values()), default=0.0)
        self.updates += 1


def make_ema(policy: DeltaPolicy) -> EmaTeacher:
    """A teacher that starts as the policy's adapter is now; with a fresh adapter, that is the base model."""
    return EmaTeacher(policy.deltas())


def save_ema(teacher: EmaTeacher, directory: Path | str) -> None:
    """Write the factors (float32 safetensors) and the counters (JSON)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, delta in teacher.deltas.items():
        tensors[f"left.{name}"] = delta.left.cpu().contiguous()
        tensors[f"right.{name}"] = delta.right.cpu().contiguous()
    save_file(tensors, directory / TENSORS_FILE)
    meta = {"format": _FORMAT, "kind": "ema_of_merged_delta", "updates": teacher.updates, "lost": teacher.lost}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")


def load_ema(policy: DeltaPolicy, directory: Path | str) -> EmaTeacher:
    """The teacher saved in `directory`. Raises AdapterError when it is unreadable or of another adapter."""
    directory = Path(directory)
    try:
        meta = json.loads((directory / META_FILE).read_text())
        tensors = load_file(directory / TENSORS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"no readable teacher state in {directory}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT or not {"updates", "lost"} <= meta.keys():
        raise AdapterError(f"the teacher state in {directory} has an unknown format")
    current = policy.deltas()
    if {f"{side}.{name}" for name in current for side in ("left", "right")} != set(tensors):
        raise AdapterError(f"the teacher state in {directory} is of an adapter on other layers")
    deltas = {name: _restored(name, tensors, like) for name, like in current.items()}
    return EmaTeacher(deltas, int(meta["updates"]), float(meta["lost"]))


def has_ema(directory: Path | str) -> bool:
    """Whether a teacher was saved there."""
    return (Path(directory) / META_FILE).is_file()


def _restored(name: str, tensors: Mapping[str, Tensor], like: LowRank) -> LowRank:
    left, right = tensors[f"left.{name}"], tensors[f"right.{name}"]
    fits = left.shape[0] == like.left.shape[0] and right.shape[1] == like.right.shape[1]
    if not fits or left.shape[1] != right.shape[0]:
        raise AdapterError(f"the saved teacher state of '{name}' has another shape than this base")
    if not all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in (left, right)):
        raise AdapterError(f"the saved teacher state of '{name}' is not finite float32")
    return LowRank(left.to(like.left.device), right.to(like.left.device))
