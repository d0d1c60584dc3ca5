"""Leave a model as it was found when something that changes its layers fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises: every submodule back in its place, what was trainable or in training mode so again.

    Weights are not copied: a block that writes into them is not undone. `peft_config`, which PEFT leaves on the model
    and reads as "an adapter is here", goes.
    """
    children = {module: dict(module._modules) for module in model.modules()}
    training = {module: module.training for module in children}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, before in children.items():
            module._modules.clear()  # what was added goes as well
            module._modules.update(before)
            module.training = training[module]
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)
        model.__dict__.pop("peft_config", None)
        raise
