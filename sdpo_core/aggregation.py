"""From per-token losses to one number, exactly, however the batch is cut into micro-batches.

Every mode is a weight per row: loss = sum_b w_b * sum_t mask_bt * loss_bt, where w_b depends on lengths only. The
weights are computed once for the whole batch, so summing micro-batches gives the batch's own value and gradient; a
mean of micro-batch means would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "row-mean-token-mean"
]


def row_weights(lengths: Sequence[int], mode: Aggregation, padded_length: int | None = None) -> list[float]:
    """Weight of each row's token sum. `lengths[b]` is the number of tokens of row b that count (0 = dead row).

    token-mean                1 / all tokens
    seq-mean-token-sum        1 / live rows
    seq-mean-token-mean       1 / (live rows * tokens of the row)
    seq-mean-token-sum-norm   1 / padded length (default: the longest row)
    row-mean-token-mean       1 / (ALL rows * tokens of the row): dead rows dilute (TRL)
    A batch of dead rows gives zeros, never 0/0.
    """
    tokens = max(sum(lengths), 1)
    live = max(sum(1 for n in lengths if n > 0), 1)
    match mode:
        case "token-mean":
            return [1.0 / tokens] * len(lengths)
        case "seq-mean-token-sum":
            return [1.0 / live] * len(lengths)
        case "seq-mean-token-mean":
            return [1.0 / (live * max(n, 1)) for n in lengths]
        case "seq-mean-token-sum-norm":
            return [1.0 / max(padded_length or max(lengths, default=1), 1)] * len(lengths)
        case "row-mean-token-mean":
            return [1.0 / (len(lengths) * max(n, 1)) for n in lengths]


def aggregate(values_BT: Tensor, mask_BT: Tensor, mode: Aggregation, *, scale: float | None = None) -> Tensor:
    """The aggregated scalar of a whole batch, attached to the graph; masked values may be NaN and count as nothing.

    `scale` overrides the padded length of seq-mean-token-sum-norm.
    """
    lengths = [int(n) for n in mask_BT.sum(-1).tolist()]
    if mode == "seq-mean-token-sum-norm":
        weights = [1.0 / (scale or values_BT.shape[-1])] * len(lengths)
    else:
        weights = row_weights(lengths, mode)
    return weighted_sum(values_BT, mask_BT, torch.tensor(weights, device=values_BT.device))


def weighted_sum(values_BT: Tensor, mask_BT: Tensor, weights_B: Tensor) -> Tensor:
    """sum_b w_b sum_t values_bt over the mask; zero gradient outside it whatever the values hold."""
    kept_BT = torch.where(mask_BT.bool(), values_BT, torch.zeros_like(values_BT))
    return (kept_BT.sum(-1) * weights_B).sum()
