"""The plain path: padded rows, logits of a whole micro-batch, one graph from the tokens to the loss.

It shows what is computed; sdpo_core.fast must give the same, and is checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpo_core.divergence import Target
from sdpo_core.fast.decoder import HiddenPolicy
from sdpo_core.fast.whole_rows import with_whole_rows
from sdpo_core.options import Options
from sdpo_core.paths import Part, PathName
from sdpo_core.policy import response_logits
from sdpo_core.samples import TokenBatch, pad_rows
from sdpo_core.scoring import Scorer, join_targets
from sdpo_core.terms import TokenTerms, token_terms


@dataclass(frozen=True)
class PlainPath(Scorer):
    """Implements `paths.Path`."""

    @property
    def name(self) -> PathName:
        return "plain"

    def with_options(self, options: Options) -> PlainPath:
        return replace(self, options=options)

    def backward(self, part: Part) -> TokenTerms:
        batch = self.student_batch(part.samples)
        terms = self._terms(part, batch, response_logits(self.policy, batch, adapter=True))
        weights_B = torch.tensor(part.weights, device=self.device)
        loss_BT = terms.loss(self.options.base_kl_weight, self.options.previous_kl_weight)
        loss: Tensor = (loss_BT.sum(-1) * weights_B).sum()
        torch.autograd.backward(loss)
        return terms

    def _terms(self, part: Part, batch: TokenBatch, logits_BTV: Tensor) -> TokenTerms:
        base, start, weights = part.base, part.start, part.token_weights
        return token_terms(
            logits_BTV, join_targets([self._whole(t) for t in part.targets]),
            pad_rows([self.ids(s) for s in part.samples]), batch.mask(), self.options.divergence,
            is_clip=self.options.is_clip, behaviour_BT=pad_rows(part.known_behaviour(self.device)),
            base_logp_BT=None if base is None else pad_rows([b.logp for b in base]),
            base_target=None if base is None else join_targets([b.target for b in base]),
            previous_logp_BT=None if start is None else pad_rows([s.logp for s in start]),
            token_weights_BT=None if weights is None else pad_rows(weights),
            policy_gradient=self.options.policy_gradient,
            rewards_B=logits_BTV.new_tensor([s.reward_advantage for s in part.samples], dtype=torch.float32),
        )  # fmt: skip

    def _whole(self, target: Target) -> Target:
        """One that the fast path scored, readable here."""
        return with_whole_rows(target, self.policy.head().logits) if isinstance(self.policy, HiddenPolicy) else target
