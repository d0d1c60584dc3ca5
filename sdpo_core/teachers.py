"""Who the teacher is: the frozen base, a trust-region mixture with the student, or a moving average.

The frozen base is the default and needs no code: the adapter is switched off. The functions here are the published
alternatives as pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def trust_region_logits(reference_logits: Tensor, student_logits: Tensor, mix: float) -> Tensor:
    """(1 - mix) * reference + mix * student on RAW logits: a geometric mixture once normalised. No gradient.

    mix 0 is the reference bit for bit, mix 1 the student. Source: lasgroup/SDPO dp_actor.py.
    """
    return torch.lerp(reference_logits.detach(), student_logits.detach(), mix)


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], rate: float) -> None:
    """teacher <- (1 - rate) * teacher + rate * student, in place.

    Keep the teacher in float32: in bfloat16 a step of 5 % rounds away and the teacher never moves. Call it once per
    batch, and only when the batch's gradient was finite. Averaging LoRA factors is not averaging their product.
    """
    if rate == 0.0:
        return
    for old, new in zip(teacher, student, strict=True):
        old.copy_((1.0 - rate) * old + rate * new.to(old.dtype))
