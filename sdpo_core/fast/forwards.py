"""Other `forward`s for modules of a model, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Forwards = Sequence[tuple[nn.Module, Callable[..., Any]]]


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Let each module run its partner for the length of a `with` block. Blocks may be nested."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, other in forwards:
            module.forward = other
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers, first to last."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
