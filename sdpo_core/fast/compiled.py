"""Decoder layers through torch.compile, for those who ask for it (`Options.compile_layers`).

All layers of a kind share what is generated for one: what stands between the matrix products (norms, rotations, gates,
additions) becomes a few kernels. It is made for any number of tokens, and once more for each other thing that changes
the code: with and without gradient, with and without the adapter, for an adapter of another rank, scale or set of
layers. Attention is called from it and not part of it (`packing.per_sequence`), since the lengths that are packed
together differ from batch to batch. The last layer, of which some rows are left out (fast.last_layer), runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sdpo_core.fast.forwards import layers_of, replaced

BACKEND: str | Callable[..., Any] = "inductor"
LIMIT = 64
"""Versions of the code of a layer; a pass that needs one more cannot be compiled."""
_given_up: list[str] = []
"""Why nothing is compiled in this process any more, once it has failed: what was missing will be missing again."""


class NotCompiledError(RuntimeError):
    """There is nothing to compile, or compiling has failed before."""


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Run all decoder layers but the last compiled for the length of a `with` block; the first pass in it compiles.

    Raises NotCompiledError. A failure shows in the pass, or in its backward pass: `why_not_compiled` knows it.
    """
    if _given_up:
        raise NotCompiledError(_given_up[0])
    layers = layers_of(model)[:-1]
    if not layers:
        raise NotCompiledError("the model has no decoder layers but its last one")
    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with strict, replaced([(layer, MethodType(_compiled(layer.__class__), layer)) for layer in layers]):
        yield


def why_not_compiled(error: Exception) -> str:
    """In a few words; empty where the error is not torch.compile's. But for one past `LIMIT` it is remembered."""
    if isinstance(error, NotCompiledError):
        return str(error)
    if not any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
        return ""
    reason = f"the layers cannot be compiled: {type(getattr(error, 'inner_exception', error)).__name__}"
    if not isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        _given_up[:] = [reason]
    return reason


def forget() -> None:
    """All that was compiled, and that it could not be."""
    _given_up.clear()
    _compiled.cache_clear()
    torch._dynamo.reset()


@cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    return torch.compile(  # type: ignore[call-overload, no-any-return] # its stubs know no recompile_limit
        kind.forward, dynamic=True, backend=BACKEND, recompile_limit=LIMIT
    )
