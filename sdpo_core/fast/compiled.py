"""Decoder layers through torch.compile, for those who ask for it (`Options.compile_layers`).

One region for all layers of a kind: what stands between their matrix products (norms, rotations, gates, additions)
becomes a few kernels. Compiled for any number of tokens, and once more for each other thing that changes the code:
with and without gradient, with and without the adapter, for an adapter of another rank. Attention is called from it
and not part of it, since the lengths that are packed together differ from batch to batch. The last layer, of which some
rows are left out (fast.last_layer), runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from sdpo_core.fast.forwards import layers_of, replaced
from sdpo_core.fast.packing import PACKED, per_sequence

BACKEND: str | Callable[..., Any] = "inductor"
LIMIT = 64
"""Versions of the code; what needs one more runs as it is."""


def compiled_layers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run all decoder layers but the last compiled for the length of a `with` block; the first pass in it compiles."""
    layers = layers_of(model)[:-1]
    return replaced([(layer, MethodType(_compiled(layer.__class__), layer)) for layer in layers])


def failed_to_compile(error: Exception) -> bool:
    """Whether it is torch.compile that said it, and nothing that was computed."""
    return any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__)


@cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    apart = torch.compiler.disable(per_sequence)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, apart)
    return torch.compile(  # type: ignore[call-overload, no-any-return] # its stubs know no recompile_limit
        kind.forward, dynamic=True, backend=BACKEND, recompile_limit=LIMIT
    )
