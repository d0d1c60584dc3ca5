"""Both paths on every micro-batch: the fast one trains, the plain one checks.

What is compared: each micro-batch's loss, every value of every token, the gradient, and what is kept of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdpo_core.divergence import Target
from sdpo_core.options import Options
from sdpo_core.paths import Part, Path, PathName
from sdpo_core.policy import Policy
from sdpo_core.report import Audit
from sdpo_core.samples import Sample
from sdpo_core.scoring import BaseScore, StartScore
from sdpo_core.terms import TokenTerms

Gradient = list[Tensor | None]


@dataclass
class AuditLog:
    """The largest differences since it was last read."""

    loss: float = 0.0
    tokens: float = 0.0
    gradient: float = 0.0
    teacher: float = 0.0

    def take(self) -> Audit:
        """What was seen in this step; the teacher's, scored once, stays."""
        found = Audit(self.loss, self.tokens, self.gradient, self.teacher)
        self.loss = self.tokens = self.gradient = 0.0
        return found


@dataclass(frozen=True)
class AuditedPath:
    """Implements `paths.Path` with `used`, and runs `reference` beside it."""

    used: Path
    reference: Path
    log: AuditLog = field(default_factory=AuditLog)

    @property
    def name(self) -> PathName:
        return self.used.name

    @property
    def policy(self) -> Policy:
        return self.used.policy

    @property
    def options(self) -> Options:
        return self.used.options

    def with_options(self, options: Options) -> AuditedPath:
        return replace(self, used=self.used.with_options(options), reference=self.reference.with_options(options))

    def groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        return self.used.groups(samples)

    def targets(self, samples: Sequence[Sample]) -> list[Target]:
        found = self.used.targets(samples)
        expected = self.reference.targets(samples)
        differences = [_target_difference(a, b) for a, b in zip(found, expected, strict=True)]
        self.log.teacher = _largest(self.log.teacher, *differences)
        return found

    def base(self, samples: Sequence[Sample]) -> list[BaseScore]:
        return self.used.base(samples)

    def start(self, samples: Sequence[Sample]) -> list[StartScore]:
        return self.used.start(samples)

    def backward(self, part: Part) -> TokenTerms:
        parameters = [p for _, p in self.used.policy.trainable()]
        before: Gradient = [p.grad for p in parameters]
        expected, expected_gradient = _alone(self.reference, part, parameters)
        found, gradient = _alone(self.used, part, parameters)
        for parameter, old, new in zip(parameters, before, gradient, strict=True):
            parameter.grad = new if old is None or new is None else old.add_(new)
        self._compare(part, found, expected)
        self.log.gradient = _largest(self.log.gradient, _relative(gradient, expected_gradient))
        return found

    def _compare(self, part: Part, found: TokenTerms, expected: TokenTerms) -> None:
        tokens = [
            float((a - b).detach().abs().max())
            for a, b in zip(vars(found).values(), vars(expected).values(), strict=True)
        ]
        self.log.tokens = _largest(self.log.tokens, *tokens)
        losses = [self._loss(part, terms) for terms in (found, expected)]
        self.log.loss = _largest(self.log.loss, abs(losses[0] - losses[1]))

    def _loss(self, part: Part, terms: TokenTerms) -> float:
        loss_BT = terms.loss(self.options.base_kl_weight, self.options.previous_kl_weight).detach().double()
        return float(loss_BT.sum(-1) @ loss_BT.new_tensor(part.weights))


def _alone(path: Path, part: Part, parameters: list[torch.nn.Parameter]) -> tuple[TokenTerms, Gradient]:
    """One path's terms, and its gradient of this micro-batch and no other."""
    for parameter in parameters:
        parameter.grad = None
    terms = path.backward(part)
    return terms, [p.grad for p in parameters]


def _relative(found: Gradient, expected: Gradient) -> float:
    """Norm of the difference over the norm of the expected one; 0 where both vanish."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    difference = math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    return difference / size if size > 0.0 else difference


def _target_difference(found: Target, expected: Target) -> float:
    """Of the kept log-probs, of the likeliest where the whole row is one path's only. Tokens on the edge of the top K
    may differ: what they hold is compared by rank."""
    if found.states is not None and found.gap is not None and expected.gap is not None:
        found, expected = found.gap, expected.gap
    pairs = [(found.logp, expected.logp)]
    if found.log_tail is not None and expected.log_tail is not None:
        pairs.append((found.log_tail, expected.log_tail))
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _largest(*values: float) -> float:
    """The largest, and nan if one is."""
    return math.nan if any(math.isnan(v) for v in values) else max(values)
