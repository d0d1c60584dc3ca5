"""The last decoder layer at the response positions only.

No later layer attends to what the last one makes of a prompt, so its queries, its output projection and its MLP are
needed where the head is. Each works row by row: it is given the rows wanted, and the others of its result are zeros
that nobody reads. Keys and values are needed of all rows.

Shape legend: P tokens of a packed row, N of them wanted, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo_core.fast.forwards import layers_of, replaced

_ROW_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Names within a layer. A model that has others computes all rows there; that these are row by row in a model is tried
out with everything else (`decoder.obstacle_in`)."""


def only_rows(model: PreTrainedModel, wanted_N: Tensor) -> AbstractContextManager[None]:
    """Compute these rows in the last layer's row-wise modules for the length of a `with` block."""
    return replaced([(module, partial(_at_rows, module.forward, wanted_N)) for module in _row_wise(model)])


def _row_wise(model: PreTrainedModel) -> list[nn.Module]:
    layers = layers_of(model)
    named = dict(layers[-1].named_modules()) if layers else {}
    return [named[name] for name in _ROW_WISE if name in named]


def _at_rows(forward: Callable[[Tensor], Tensor], wanted_N: Tensor, x_1PI: Tensor) -> Tensor:
    """(1, P, O): `forward` of the wanted rows, zeros elsewhere."""
    made_1NO = forward(x_1PI.index_select(1, wanted_N))
    whole_1PO = made_1NO.new_zeros(1, x_1PI.shape[1], made_1NO.shape[-1])
    return whole_1PO.index_copy(1, wanted_N, made_1NO)
