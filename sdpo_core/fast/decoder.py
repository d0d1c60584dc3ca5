"""A causal language model taken apart: the decoder on packed sequences, and its output head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo_core.fast.head import Head
from sdpo_core.fast.lora_linear import fused_lora
from sdpo_core.fast.packing import PackedBatch, attention_arguments, pack, packed_attention
from sdpo_core.lowrank import LowRank
from sdpo_core.policy import Policy

_PROBES = ((0, 1, 2, 3, 4), (3, 1, 2))
_LONGEST_PROBE = 512
"""Tokens: a window up to this is tried out, a wider one is the plain path's."""


@runtime_checkable
class HiddenPolicy(Policy, Protocol):
    """A policy whose logits are `head()` applied to hidden states."""

    def obstacle(self) -> str:
        """Why that does not hold for this model, in a few words; empty when it does."""
        ...

    def head(self) -> Head: ...

    def hidden(self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False) -> Tensor:
        """What the head is applied to at the positions that predict the response tokens, (N, H). Without gradient
        when `adapter` is off. `checkpointing`: keep each layer's input only and compute the rest again."""
        ...

    def delta_hidden(self, batch: PackedBatch, deltas: Mapping[str, LowRank]) -> Tensor:
        """The same of the base model with these deltas in the adapter's place; no gradient."""
        ...


def head_of(model: PreTrainedModel) -> Head:
    """The output layer. Raises TypeError where it is no plain linear layer."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise TypeError(f"the output head is a {type(layer).__name__}, not a plain linear layer")
    return Head(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    decoder = model.base_model
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} has no decoder apart from its head")
    return decoder


def hidden_states(model: PreTrainedModel, batch: PackedBatch, *, checkpointing: bool = False) -> Tensor:
    """The decoder's output at `batch.predicts_N`, (N, H)."""
    decoder = decoder_of(model)
    with _fast_layers(model), _checkpointed(model, checkpointing):
        out = decoder(
            input_ids=batch.ids_P.unsqueeze(0), position_ids=batch.positions_P.unsqueeze(0), use_cache=False,
            **attention_arguments(batch),
        )  # fmt: skip
    states_PH: Tensor = out.last_hidden_state[0]
    return states_PH.index_select(0, batch.predicts_N)


@contextmanager
def _fast_layers(model: PreTrainedModel) -> Iterator[None]:
    with packed_attention(model), fused_lora(model):
        yield


@contextmanager
def _checkpointed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Transformers checkpoints layers that are in training mode; only the layers' own flag is set, so that nothing
    inside them (dropout) changes its behaviour. What is computed again attends as it did the first time."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _fast_layers(model)))
    for layer in layers:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = again
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing, layer.training = False, False


@torch.no_grad()
def obstacle_in(model: PreTrainedModel) -> str:
    """Whether decoder and head, apart and packed, give what the whole model gives: tried on a few tokens.

    The head must give the model's logits from what the model gives it; the packed decoder must give that, up to
    rounding. A soft cap, a scale, an unknown attention show here.
    """
    try:
        head = head_of(model)
        probes = _probes(model)
        batch = pack([p[:-1] for p in probes], [p[-1:] for p in probes], model.device)
        found_NH = hidden_states(model, batch)
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        return f"the model cannot be packed: {error}"
    for row, probe in enumerate(probes):
        state_H, logits_V = _last_position(model, probe[:-1])
        if not _close(head.logits(state_H), logits_V, 1e-3):
            return "the model's logits are not its output layer's alone"
        if not _close(found_NH[row], state_H, 1e-4 if state_H.dtype == torch.float32 else 5e-2):
            return "the model attends in a way that packing does not know"
    return ""


def _probes(model: PreTrainedModel) -> tuple[tuple[int, ...], ...]:
    """Two short texts, and one longer than the window where attention has one: some models let attention know it by the
    mask alone, which a packed batch does not have. Raises ValueError for a window too wide to try."""
    window = _window(model)
    if window <= _LONGEST_PROBE:
        return (*_PROBES, tuple(i % 5 for i in range(window + 5))) if window else _PROBES
    raise ValueError(f"its attention window of {window} tokens is too wide to try")


def _window(model: PreTrainedModel) -> int:
    """Tokens that a position sees at most, by the configuration; 0: all."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return max((w for w in named if isinstance(w, int)), default=0)


def _last_position(model: PreTrainedModel, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What the head is given (H,) and what the model says (V,)."""
    seen: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        hook.remove()
    return seen[0][0, -1], out.logits[0, -1]


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())
