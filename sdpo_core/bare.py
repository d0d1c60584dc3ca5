"""The base model alone as a policy: for what needs no adapter, before one is attached.

The frozen teacher's answers and scores, the base's distance and the judgement of standing remarks depend on the base
and on tokens only. Asked of the bare model they cost no pass through PEFT's layers, and the samples of several
adapters can be asked together. What it answers is bit for bit what `LoraPolicy` answers with its adapter off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo_core.errors import AdapterError
from sdpo_core.fast.decoder import head_of, hidden_states, obstacle_in
from sdpo_core.fast.packing import PackedBatch
from sdpo_core.fast.prefixes import Read, read_behind, reads_on
from sdpo_core.fast.scores import Head
from sdpo_core.lora_policy import kept_logits, takes_logits_to_keep
from sdpo_core.lowrank import LowRank
from sdpo_core.samples import TokenBatch
from sdpo_core.seal import seal_of, vocabulary_of, window_of
from sdpo_core.writing import ends_of, write_greedily


class BarePolicy:
    """Implements `writing.Writer`, `fast.decoder.HiddenPolicy` and `identity.KnownBase`. It trains nothing: raises
    AdapterError `no_adapter` when it is asked for one."""

    def __init__(self, base: PreTrainedModel, obstacle: str | None = None, reads_on: bool | None = None) -> None:
        """What `obstacle_in(base)` and `fast.prefixes.reads_on(base)` say, where it is known already."""
        self._base = base.eval()
        self._known_obstacle = obstacle
        self._reads_on = reads_on

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._base.parameters()).device
        return device

    @property
    def window(self) -> int | None:
        return window_of(self._base)

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self._base)

    @cached_property
    def base_seal(self) -> tuple[Tensor, ...]:
        """See `LoraPolicy.base_seal`: equal for the same base."""
        seal = seal_of(self._base)
        return seal.sums, seal.answers

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return []

    @torch.no_grad()
    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        """(B, N - first_logit, V)."""
        _refuse(adapter)
        return kept_logits(self._base, batch, self._keeps_logits)

    def obstacle(self) -> str:
        return obstacle_in(self._base) if self._known_obstacle is None else self._known_obstacle

    def head(self) -> Head:
        return head_of(self._base)

    @torch.no_grad()
    def hidden(
        self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """(N, H); nothing is kept for a backward pass, so there is nothing to checkpoint."""
        _refuse(adapter)
        return hidden_states(self._base, batch, compiled=compiled)

    def delta_hidden(self, batch: PackedBatch, deltas: Mapping[str, LowRank]) -> Tensor:  # noqa: ARG002
        raise _no_adapter()

    @property
    def ends(self) -> frozenset[int]:
        return ends_of(self._base)

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, should_stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, ...]]:
        """Greedy answers."""
        return write_greedily(self._base, prompts, max_new_tokens, should_stop)

    @property
    def reads_on(self) -> bool:
        """See `fast.prefixes.PrefixReader`. Tried once."""
        if self._reads_on is None:
            self._reads_on = not self.obstacle() and reads_on(self._base)
        return self._reads_on

    def read(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], known: Read | None
    ) -> tuple[list[Tensor], Read]:
        states_NH, read = read_behind(self._base, prompts, responses, known)
        return list(torch.split(self.head().logits(states_NH), [len(r) for r in responses])), read

    @cached_property
    def _keeps_logits(self) -> bool:
        return takes_logits_to_keep(self._base)


def _refuse(adapter: bool) -> None:
    if adapter:
        raise _no_adapter()


def _no_adapter() -> AdapterError:
    return AdapterError("the bare base model has no adapter: attach one first", code="no_adapter")
