"""What a teacher's scores belong to, as digests: they are of use for that and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sdpo_core.divergence import Target
from sdpo_core.ema import EmaTeacher
from sdpo_core.errors import TargetError
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample
from sdpo_core.scoring import BaseScore


@runtime_checkable
class KnownBase(Protocol):
    """A policy that can say which base it stands on."""

    @property
    def base_seal(self) -> tuple[Tensor, ...] | None: ...


@dataclass(frozen=True)
class TargetKey:
    """What a target was scored for. Empty where nobody can tell (the base of a policy that is no `KnownBase`)."""

    text: str
    """The teacher's prompt and the answer."""
    kept: str
    """What was kept of its distribution."""
    teacher: str
    """Who it was, weights included where they are not the base's own."""
    base: str


@dataclass(frozen=True)
class TeacherTarget:
    """What is kept of the teacher for one sample, and what it is good for. Made by `teacher_targets`."""

    target: Target
    key: TargetKey


@dataclass(frozen=True)
class AnchorScore:
    """The base model's view of one sample's plain prompt, and what it is good for. Made by `anchor_scores`."""

    score: BaseScore
    key: TargetKey


def anchor_keys(policy: Policy, samples: Sequence[Sample]) -> list[TargetKey]:
    """The key of each sample's anchor. Which options are asked does not matter: one kind is kept."""
    base = _base(policy)
    return [TargetKey(_digest_of(s, s.prompt_ids), "the base's distance", "base", base) for s in samples]


def target_keys(policy: Policy, samples: Sequence[Sample], options: Options, ema: EmaTeacher | None) -> list[TargetKey]:
    """The key of each sample's target under the policy as it is now."""
    kept, teacher, base = _kept(options), _teacher(policy, options, ema), _base(policy)
    return [TargetKey(_text(s), kept, teacher, base) for s in samples]


def check_key(row: int, found: TargetKey, wanted: TargetKey, anew: str = "teacher_targets") -> None:
    """Raises TargetError that says what `found` differs in, and that `anew` makes another."""
    differences = {
        "text": "for another answer or another prompt",
        "kept": f"for other options: {found.kept}; these need {wanted.kept}",
        "teacher": "by another teacher, or by this one with other weights",
        "base": "on another base model",
    }
    for name, said in differences.items():
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if ours and theirs and ours != theirs:
            raise TargetError(f"the target of sample {row} was scored {said}: score it anew with {anew}")


def _text(sample: Sample) -> str:
    return _digest_of(sample, sample.teacher_prompt_ids)


def _digest_of(sample: Sample, prompt_ids: tuple[int, ...]) -> str:
    if not sample.live:
        return "dead"
    return hashlib.sha256(repr((prompt_ids, sample.response_ids)).encode()).hexdigest()


def _kept(options: Options) -> str:
    """Of the divergence only what decides which numbers are kept."""
    spec = options.divergence
    match spec.support:
        case "teacher":
            return f"support teacher, top_k {spec.top_k}, outside {spec.outside}"
        case "sampled" if spec.top_k is not None:
            return f"support sampled, top_k {spec.top_k}, sampled_floor {spec.sampled_floor}"
        case "sampled":
            return "support sampled, top_k None"
        case _:
            return "the whole distribution"


def _teacher(policy: Policy, options: Options, ema: EmaTeacher | None) -> str:
    weights: list[Tensor] = []
    if options.teacher == "ema" and ema is not None:
        weights += [factor for delta in ema.deltas.values() for factor in (delta.left, delta.right)]
    if options.teacher == "previous" or options.teacher_mix > 0:
        weights += [parameter for _, parameter in policy.trainable()]
    return f"{options.teacher} {options.teacher_mix} {_digest(weights)}"


def _base(policy: Policy) -> str:
    if not isinstance(policy, KnownBase) or policy.base_seal is None:
        return ""
    return _digest(policy.base_seal)


@torch.no_grad()
def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.cpu().numpy().tobytes())
    return digest.hexdigest()
