"""The fast path: packed rows, hidden states of the response positions, the head in chunks.

Shape legend: N response tokens of a micro-batch, H hidden width, V vocabulary, B samples, T longest response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sdpo_core.divergence import Target
from sdpo_core.fast.decoder import HiddenPolicy
from sdpo_core.fast.head import LossSpec, RowInputs, loss_and_gradient
from sdpo_core.fast.packing import PackedBatch, pack, packed_groups
from sdpo_core.fast.records import joined, split
from sdpo_core.fast.scores import Head, chunk_tokens, kept_teacher, response_logp, scored
from sdpo_core.options import Options
from sdpo_core.paths import Part, PathName
from sdpo_core.policy import Policy
from sdpo_core.samples import Sample, pad_rows
from sdpo_core.scoring import BaseScore, Scorer, StartScore, base_score, join_targets, start_score
from sdpo_core.signals import advantages_of
from sdpo_core.teachers import trust_region_logits
from sdpo_core.terms import TokenTerms, clean

R = TypeVar("R")


def obstacle(policy: Policy) -> str:
    """Why the fast path cannot take this policy, in a few words; empty when it can. It takes all options."""
    if not isinstance(policy, HiddenPolicy):
        return "the policy gives logits only, no hidden states"
    return policy.obstacle()


@dataclass(frozen=True)
class FastPath(Scorer):
    """Implements `paths.Path` where `obstacle` finds nothing in the way."""

    @property
    def name(self) -> PathName:
        return "fast"

    def with_options(self, options: Options) -> FastPath:
        return replace(self, options=options)

    @property
    def _model(self) -> HiddenPolicy:
        assert isinstance(self.policy, HiddenPolicy)  # noqa: S101 - `obstacle` was asked
        return self.policy

    def _hidden(self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False) -> Tensor:
        compiled = self.options.compile_layers
        return self._model.hidden(batch, adapter=adapter, checkpointing=checkpointing, compiled=compiled)

    def groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        return packed_groups([s.student_length for s in samples], self.options.micro_batch_tokens)

    @torch.no_grad()
    def targets(self, samples: Sequence[Sample]) -> list[Target]:
        found: list[Target] = []
        lengths = [len(s.teacher_prompt_ids) + len(s.response_ids) for s in samples]
        for rows in packed_groups(lengths, self.options.micro_batch_tokens):
            part = [samples[r] for r in rows]
            batch = pack([s.teacher_prompt_ids for s in part], [s.response_ids for s in part], self.device)
            found += split(self._kept(batch, self._teacher_hidden(batch)), batch.response_lengths)
        return found

    def _kept(self, batch: PackedBatch, states_NH: Tensor) -> Target:
        head, spec = self._model.head(), self.options.divergence
        return kept_teacher(head, states_NH, batch.response_ids_N, spec, self._chunk(head))

    def _teacher_hidden(self, batch: PackedBatch) -> Tensor:
        if self.options.teacher == "ema":
            assert self.ema is not None  # noqa: S101 - checked when made
            hidden_NH = self._model.delta_hidden(batch, self.ema.deltas)
        else:
            hidden_NH = self._hidden(batch, adapter=self.options.teacher in ("previous", "live"))
        if self.options.teacher_mix == 0:
            return hidden_NH
        # The head is linear: mixed states give mixed logits.
        return trust_region_logits(hidden_NH, self._hidden(batch, adapter=True), self.options.teacher_mix)

    @torch.no_grad()
    def base(self, samples: Sequence[Sample]) -> list[BaseScore]:
        return self._plain_scored(samples, base_score, adapter=False)

    @torch.no_grad()
    def start(self, samples: Sequence[Sample]) -> list[StartScore]:
        return self._plain_scored(samples, start_score, adapter=True)

    def _plain_scored(
        self, samples: Sequence[Sample], keep: Callable[[Tensor, Tensor], R], *, adapter: bool
    ) -> list[R]:
        """Something of every sample's plain prompt."""
        found: list[R] = []
        for rows in self.groups(samples):
            batch = self._packed([samples[r] for r in rows])
            found += self._scored(batch, self._hidden(batch, adapter=adapter), keep)
        return found

    def _packed(self, samples: Sequence[Sample]) -> PackedBatch:
        return pack([s.prompt_ids for s in samples], [s.response_ids for s in samples], self.device)

    def _scored(self, batch: PackedBatch, hidden_NH: Tensor, keep: Callable[[Tensor, Tensor], R]) -> list[R]:
        head = self._model.head()
        found = scored(head.logits, hidden_NH, batch.response_ids_N, self._chunk(head), keep)
        return split(found, batch.response_lengths)

    def backward(self, part: Part) -> TokenTerms:
        batch, head = self._packed(part.samples), self._model.head()
        hidden_NH = self._hidden(batch, adapter=True, checkpointing=self.options.checkpointing)
        terms, gradient_NH = loss_and_gradient(
            head, hidden_NH, batch.response_ids_N, joined(part.targets), self._inputs(part, batch, hidden_NH),
            self._loss_spec(), self.options.chunk_tokens or 0,
        )  # fmt: skip
        torch.autograd.backward(hidden_NH, gradient_NH)
        rows = split(terms, batch.response_lengths)
        return TokenTerms(**{name: pad_rows([vars(row)[name] for row in rows]) for name in vars(terms)})

    def _inputs(self, part: Part, batch: PackedBatch, hidden_NH: Tensor) -> RowInputs:
        base, start, weights = part.base, part.start, part.token_weights
        sizes = torch.tensor([len(s.response_ids) for s in part.samples], device=self.device)
        return RowInputs(
            weights_N=torch.tensor(part.weights, device=self.device).repeat_interleave(sizes),
            behaviour_N=torch.cat(part.known_behaviour(self.device)),
            base_logp_N=None if base is None else torch.cat([b.logp for b in base]),
            base_target=None if base is None else joined([b.target for b in base]),
            previous_logp_N=None if start is None else torch.cat([s.logp for s in start]),
            token_weights_N=None if weights is None else torch.cat(weights),
            advantage_N=None if self.options.policy_gradient is None else self._advantages(part, batch, hidden_NH),
        )

    @torch.no_grad()
    def _advantages(self, part: Part, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        """Of every token, (N,), from whole answers: one more pass through the head, since they must be known before the
        first chunk's loss."""
        assert self.options.policy_gradient is not None  # noqa: S101 - the caller asked
        logp_BT = pad_rows([scored.logp for scored in self._scored(batch, hidden_NH, response_logp)])
        mask_BT = pad_rows([torch.ones(len(s.response_ids), device=self.device) for s in part.samples]) > 0
        behaviour_BT = pad_rows(part.known_behaviour(self.device)).float()
        advantage_BT = advantages_of(
            logp_BT, clean(join_targets(part.targets), mask_BT).logp,
            torch.where(mask_BT & ~behaviour_BT.isnan(), behaviour_BT, logp_BT), mask_BT, self.options.policy_gradient,
            logp_BT.new_tensor([s.reward_advantage for s in part.samples]),
        )  # fmt: skip
        return advantage_BT[mask_BT]

    def _loss_spec(self) -> LossSpec:
        o = self.options
        return LossSpec(o.divergence, o.is_clip, o.base_kl_weight, o.previous_kl_weight, o.policy_gradient)

    def _chunk(self, head: Head) -> int:
        return self.options.chunk_tokens or chunk_tokens(len(head.weight_VH))
