"""The one thing the training loop asks of a model: logits with the adapter on or off, and what may be trained."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sdpo_core.samples import TokenBatch


class Policy(Protocol):
    """A causal language model with a trainable adapter over a frozen base."""

    @property
    def device(self) -> torch.device: ...

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        """Logits at positions `batch.first_logit` .. end, (B, N - first_logit, V).

        `adapter=False` is the base model itself: no adapter, no gradient. Rows are right-padded, and what a row holds
        after position i must not influence its logits at i.
        """
        ...

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters with stable names."""
        ...


def response_logits(policy: Policy, batch: TokenBatch, *, adapter: bool) -> Tensor:
    """The logits that predict each response token, (B, T, V). Rows shorter than T repeat some real position."""
    return at_responses(policy.logits(batch, adapter=adapter), batch)


def at_responses(logits_BMV: Tensor, batch: TokenBatch) -> Tensor:
    """From logits at `first_logit` .. end to those that predict each response token, (B, M, V) -> (B, T, V)."""
    index_BT = batch.positions() - batch.first_logit
    return logits_BMV.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, logits_BMV.shape[-1]))
