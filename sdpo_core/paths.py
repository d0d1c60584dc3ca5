"""The two ways through a micro-batch, as the training loop sees them.

A path scores what is fixed and runs one micro-batch forward and backward; which samples, which weights and what
becomes of the gradient is the loop's affair. sdpo_core.plain is the readable one, sdpo_core.fast.path the cheap one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sdpo_core.divergence import Target
from sdpo_core.options import Options
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample
from sdpo_core.scoring import BaseScore, StartScore
from sdpo_core.terms import TokenTerms

PathName = Literal["plain", "fast"]


@dataclass(frozen=True)
class Part:
    """One micro-batch; lists by sample. Tensors are (T,) of that sample's response."""

    samples: list[Sample]
    targets: list[Target]
    weights: list[float]
    """Of each sample's token sum in the loss."""
    behaviour: list[Tensor | None]
    """None = the student's own log-probs of this forward pass."""
    base: list[BaseScore] | None = None
    start: list[StartScore] | None = None
    token_weights: list[Tensor] | None = None

    def known_behaviour(self, device: torch.device) -> list[Tensor]:
        """Behaviour log-probs, NaN where the student's own are to be taken."""
        unknown = [torch.full((len(s.response_ids),), math.nan, device=device) for s in self.samples]
        return [u if k is None else k for k, u in zip(self.behaviour, unknown, strict=True)]


class Path(Protocol):
    """Everything is without gradient but what `backward` leaves in the parameters' `.grad`."""

    @property
    def name(self) -> PathName: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def options(self) -> Options: ...

    def with_options(self, options: Options) -> Path:
        """The same path under options that differ in how much it does at a time."""
        ...

    def groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Micro-batches of the plain prompts: row numbers."""
        ...

    def targets(self, samples: Sequence[Sample]) -> list[Target]:
        """What is kept of the teacher per sample."""
        ...

    def base(self, samples: Sequence[Sample]) -> list[BaseScore]:
        """The base model behind the plain prompts."""
        ...

    def start(self, samples: Sequence[Sample]) -> list[StartScore]:
        """The student as it is now, behind the plain prompts."""
        ...

    def backward(self, part: Part) -> TokenTerms:
        """Add the gradient of the micro-batch's share of the loss; its terms, padded (B, T)."""
        ...
