"""A causal language model taken apart: the decoder on packed sequences, and its output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdpo_core.fast.compiled import compiled_layers
from sdpo_core.fast.forwards import layers_of, replaced
from sdpo_core.fast.last_layer import only_rows
from sdpo_core.fast.lora_linear import fused_lora
from sdpo_core.fast.packing import PackedBatch, attention_arguments, pack, packed_attention
from sdpo_core.fast.scores import Head
from sdpo_core.fast.windows import NARROW, has_window, narrow_windows
from sdpo_core.lowrank import LowRank
from sdpo_core.policy import Policy
from sdpo_core.sharded import OBSTACLE, is_sharded

_PROBES = ((0, 1, 2, 3, 4), (3, 1, 2))
_BEYOND_WINDOW = tuple(i % 5 for i in range(NARROW + 5))


@runtime_checkable
class HiddenPolicy(Policy, Protocol):
    """A policy whose logits are `head()` applied to hidden states."""

    def obstacle(self) -> str:
        """Why that does not hold for this model, in a few words; empty when it does."""
        ...

    def head(self) -> Head: ...

    def hidden(
        self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False
    ) -> Tensor:
        """What the head is applied to at the positions that predict the response tokens, (N, H). Without gradient
        when `adapter` is off. `checkpointing`: keep each layer's input only and compute the rest again. `compiled`: the
        layers through torch.compile."""
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


def hidden_states(
    model: PreTrainedModel, batch: PackedBatch, *, checkpointing: bool = False, compiled: bool = False
) -> Tensor:
    """The decoder's output at `batch.predicts_N`, (N, H). See `HiddenPolicy.hidden`."""
    decoder, fast = decoder_of(model), partial(_fast_layers, model, batch, compiled)
    with fast(), _checkpointed(model, fast) if checkpointing else nullcontext():
        out = decoder(
            input_ids=batch.ids_P.unsqueeze(0), position_ids=batch.positions_P.unsqueeze(0), use_cache=False,
            **attention_arguments(batch),
        )  # fmt: skip
    states_PH: Tensor = out.last_hidden_state[0]
    return states_PH.index_select(0, batch.predicts_N)


@contextmanager
def _fast_layers(model: PreTrainedModel, batch: PackedBatch, compiled: bool) -> Iterator[None]:
    with (
        packed_attention(model), fused_lora(model), only_rows(model, batch.predicts_N),
        compiled_layers(model) if compiled else nullcontext(),
    ):  # fmt: skip
        yield


def _checkpointed(
    model: PreTrainedModel, fast: Callable[[], AbstractContextManager[None]]
) -> AbstractContextManager[None]:
    """Keep each layer's input only for the length of a `with` block. What is computed again, much later, runs in
    `fast()` as it did the first time. Nothing inside a layer (dropout) is told."""
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), fast()))
    return replaced([(layer, partial(again, layer.forward)) for layer in layers_of(model)])


@torch.no_grad()
def obstacle_in(model: PreTrainedModel) -> str:
    """Whether decoder and head, apart and packed, give what the whole model gives: tried on a few tokens.

    The head must give the model's logits from what the model gives it; the packed decoder must give that, up to
    rounding, and whatever the sequence before it in the row. A soft cap, a scale, an unknown attention show here.
    """
    if is_sharded(model):
        return OBSTACLE
    try:
        head = head_of(model)
        probes = _probes(model)
        with narrow_windows(model):
            found_NH = _packed_states(model, probes)
            beside_NH = _packed_states(model, (probes[0][::-1], *probes[1:]))
            expected = [_last_position(model, probe[:-1]) for probe in probes]
    except torch.OutOfMemoryError:
        raise
    except (
        TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        return f"the model cannot be packed: {error}"
    tolerance = 1e-4 if found_NH.dtype == torch.float32 else 5e-2
    for found_H, (state_H, logits_V) in zip(found_NH, expected, strict=True):
        if not _close(head.logits(state_H), logits_V, 1e-3):
            return "the model's logits are not its output layer's alone"
        if not _close(found_H, state_H, tolerance):
            return "the model attends in a way that packing does not know"
    if not _close(beside_NH[1:], found_NH[1:], tolerance / 100):
        return "the model lets packed sequences see each other"
    return ""


def _packed_states(model: PreTrainedModel, probes: tuple[tuple[int, ...], ...]) -> Tensor:
    """What the packed decoder gives at the last position of each, (probes, H)."""
    return hidden_states(model, pack([p[:-1] for p in probes], [p[-1:] for p in probes], model.device))


def _probes(model: PreTrainedModel) -> tuple[tuple[int, ...], ...]:
    """Two short texts, and where attention has a window one longer than that: some models let attention know it by the
    mask alone, which a packed batch does not have. Raises ValueError for an attention that nobody can exchange or a
    window that cannot be tried out."""
    if not model._can_set_attn_implementation():
        raise ValueError("its attention is its own, not one of Transformers' exchangeable functions")
    if not has_window(model):
        return _PROBES
    wide_V = _last_position(model, _BEYOND_WINDOW)[1]
    with narrow_windows(model):
        if torch.equal(_last_position(model, _BEYOND_WINDOW)[1], wide_V):
            raise ValueError("its attention window cannot be tried out")
    return (*_PROBES, _BEYOND_WINDOW)


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
