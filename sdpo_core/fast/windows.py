"""Attention windows, made narrow for as long as a model is tried out: any width shows on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

NARROW = 8
"""Tokens, at most: a window is at least halved, so that its effect shows."""
_NAMES = ("sliding_window", "attention_chunk_size")
_WINDOWED = {"sliding_attention", "chunked_attention"}


def has_window(model: PreTrainedModel) -> bool:
    """Whether some layer sees no further than a window, by the configuration."""
    config: Any = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers is not None and _WINDOWED.isdisjoint(layers):
        return False
    return any(isinstance(getattr(config, name, None), int) for name in _NAMES)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Every window, in the configuration and in the layers that copied it, is narrow within the block."""
    # A configuration has checks of its own on assignment; what is put back must not meet them.
    places = {id(p): p.__dict__ for p in (model.config, model.config.get_text_config(), *model.modules())}
    wide = [
        (values, name, values[name])
        for values in places.values()
        for name in _NAMES
        if isinstance(values.get(name), int)
    ]
    try:
        for values, name, width in wide:
            values[name] = min(NARROW, max(width // 2, 1))
        yield
    finally:
        for values, name, width in wide:
            values[name] = width
