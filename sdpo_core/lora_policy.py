"""A LoRA adapter on a base model as a policy: logits and hidden states with the adapter on, off, or replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo_core.errors import AdapterError
from sdpo_core.fast.decoder import head_of, hidden_states, obstacle_in
from sdpo_core.fast.packing import PackedBatch
from sdpo_core.fast.scores import Head
from sdpo_core.lowrank import LowRank
from sdpo_core.samples import TokenBatch
from sdpo_core.seal import BaseSeal, seal_of, vocabulary_of, window_of
from sdpo_core.writing import ends_of, write_greedily


class LoraPolicy:
    """A base model with one LoRA adapter attached; implements `sdpo_core.ema.DeltaPolicy`."""

    def __init__(self, model: PeftModel, seal: BaseSeal | None = None, obstacle: str | None = None) -> None:
        """`obstacle`: what `obstacle_in(base)` says, where it is known already."""
        self.model = model.eval()  # no dropout anywhere: a step must be reproducible
        self._seal = seal
        self._known_obstacle = obstacle
        self._detached = False

    def detach(self) -> nn.Module:
        """Take the adapter off and give back the base, bit-identical to what it was; the policy is over then."""
        base: nn.Module = self.model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        self._detached = True
        return base

    def check_attached(self) -> None:
        """Raises AdapterError `adapter_detached` once the adapter is off: what is left answers as the base."""
        if self._detached:
            message = "the adapter was taken off its base: use the policy inside `with attached(...)`"
            raise AdapterError(message, code="adapter_detached")

    def base_intact(self) -> bool:
        """Whether the base, adapter off, is bit for bit what it was before the adapter was attached: every weight, and
        what it answers."""
        if self._seal is None:
            return True
        with self._bare():
            return self._seal.same(seal_of(self.model.get_base_model()))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def window(self) -> int | None:
        """Most tokens of one sequence, by the model's configuration; None where it names no bound."""
        return window_of(self.model.get_base_model())

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return vocabulary_of(self.model.get_base_model())

    @property
    def base_seal(self) -> tuple[Tensor, ...] | None:
        """Which base it is: its weights' sums and its answers when the adapter was attached (`seal_of`)."""
        return None if self._seal is None else (self._seal.sums, self._seal.answers)

    def base_unchanged(self, base: nn.Module) -> bool:
        """The same of the detached base."""
        return self._seal is None or self._seal.same(seal_of(base))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """LoRA factors in model order, named as in the saved file's keys. Raises AdapterError `adapter_detached`."""
        self.check_attached()
        return [
            (name.replace(".default.", "."), parameter)
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        ]

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        """(B, N - first_logit, V). `adapter=False`: the base model, without gradient."""
        self.check_attached()
        if adapter:
            return self._forward(batch)
        with self._bare():
            return self._forward(batch)

    def obstacle(self) -> str:
        """See `fast.decoder.HiddenPolicy`. Tried once, on the bare base."""
        return self._obstacle if self._known_obstacle is None else self._known_obstacle

    @cached_property
    def _obstacle(self) -> str:
        base = self.model.get_base_model()
        if not isinstance(base, PreTrainedModel):
            return f"the base is a {type(base).__name__}, no model of Transformers"
        with self._bare():
            return obstacle_in(base)

    def head(self) -> Head:
        return head_of(self.model.get_base_model())

    def hidden(
        self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False
    ) -> Tensor:
        """(N, H), see `fast.decoder.HiddenPolicy`."""
        self.check_attached()
        if adapter:
            base = self.model.get_base_model()
            return hidden_states(base, batch, checkpointing=checkpointing, compiled=compiled)
        with self._bare():
            return hidden_states(self.model.get_base_model(), batch, compiled=compiled)

    def delta_hidden(self, batch: PackedBatch, deltas: Mapping[str, LowRank]) -> Tensor:
        """(N, H) of the base model plus `deltas`, one per adapted layer; the adapter itself is off. No gradient."""
        with self._bare(deltas):
            return hidden_states(self.model.get_base_model(), batch)

    @torch.no_grad()
    def deltas(self) -> dict[str, LowRank]:
        """alpha / rank * B A of every adapted layer, as float32 copies.

        Raises AdapterError `no_moving_average` for an adapted layer that is no linear one (an embedding).
        """
        self.check_attached()
        found = {}
        for name, layer in self._layers():
            if "default" not in layer.lora_B:
                message = f"teacher 'ema' cannot follow the adapter on {name}: adapt linear layers only"
                raise AdapterError(message, code="no_moving_average")
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            found[name] = LowRank(layer.scaling["default"] * b.float(), a.detach().float().clone())
        return found

    def delta_logits(self, batch: TokenBatch, deltas: Mapping[str, LowRank]) -> Tensor:
        """The base model plus `deltas`, one per adapted layer; the adapter itself is off. No gradient."""
        with self._bare(deltas):
            return self._forward(batch)

    @property
    def ends(self) -> frozenset[int]:
        return ends_of(self.model)

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, should_stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, ...]]:
        """Greedy answers of the base, the adapter off. Raises ContextTooLong for a prompt that fills the window."""
        with self._bare():
            return write_greedily(self.model, prompts, max_new_tokens, should_stop, self.window)

    @contextmanager
    def _bare(self, deltas: Mapping[str, LowRank] | None = None) -> Iterator[None]:
        """Without gradient and without the adapter; `deltas` take its place.

        PEFT's own `disable_adapter` inspects every layer first, which takes longer than a small model runs.
        """
        with torch.no_grad(), ExitStack() as undo:
            self.model.base_model.disable_adapter_layers()
            undo.callback(self.model.base_model.enable_adapter_layers)
            if deltas is not None:
                for name, layer in self._layers():
                    undo.callback(layer.register_forward_hook(_adding(deltas[name])).remove)
            yield

    def _layers(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer)]

    def _forward(self, batch: TokenBatch) -> Tensor:
        return kept_logits(self.model, batch, self._keeps_logits)

    @cached_property
    def _keeps_logits(self) -> bool:
        return takes_logits_to_keep(self.model.get_base_model())


def _adding(delta: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + delta.apply(inputs[0]).to(output.dtype)

    return hook


def kept_logits(model: Any, batch: TokenBatch, keeps: bool) -> Tensor:
    """Of the positions from `first_logit` on, (B, N - first_logit, V). `keeps`: the model can be told so."""
    keep = batch.ids_BN.shape[1] - batch.first_logit
    wanted = {"logits_to_keep": keep} if keeps else {}
    out = model(input_ids=batch.ids_BN, attention_mask=batch.attention_BN, use_cache=False, **wanted)
    logits: Tensor = out.logits
    return logits[:, -keep:]  # all of them, where the model cannot be told how many


def takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
