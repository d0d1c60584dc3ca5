"""A weight delta as a product of thin factors, and weighted sums of such deltas that stay thin.

Shape legend: O output features, I input features, R rank. All float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NOTHING = 1e-7  # singular values below this share of the largest are float32 rounding noise


@dataclass(frozen=True)
class LowRank:
    """The (O, I) matrix left @ right."""

    left: Tensor
    """(O, R)"""
    right: Tensor
    """(R, I)"""

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """(O, I)"""
        return self.left @ self.right

    def apply(self, inputs: Tensor) -> Tensor:
        """(..., I) -> (..., O), computed in float32."""
        return (inputs.float() @ self.right.T) @ self.left.T


@dataclass(frozen=True)
class Summed:
    """A weighted sum and the share of its Frobenius norm that the rank bound cut off."""

    delta: LowRank
    lost: float


@torch.no_grad()
def weighted_sum(parts: Sequence[tuple[float, LowRank]], max_rank: int) -> Summed:
    """sum_i w_i D_i with rank `max_rank` at most.

    Exact while the ranks add up to `max_rank` at most: the factors are stacked. Beyond it, the best approximation of
    that rank (singular values of the product, found from the thin factors; no (O, I) matrix is formed).
    """
    used = [(w, d) for w, d in parts if w != 0.0 and d.rank > 0] or [(0.0, parts[0][1])]
    left = torch.cat([w * d.left for w, d in used], dim=1)
    right = torch.cat([d.right for _, d in used], dim=0)
    if left.shape[1] <= max_rank:
        return Summed(LowRank(left, right), 0.0)
    return _compressed(left, right, max_rank)


def _compressed(left_OR: Tensor, right_RI: Tensor, max_rank: int) -> Summed:
    basis_OR, upper_RR = torch.linalg.qr(left_OR.double())
    basis_IR, lower_RR = torch.linalg.qr(right_RI.double().T)
    u, values, vh = torch.linalg.svd(upper_RR @ lower_RR.T)
    keep = min(max_rank, max(1, int((values > _NOTHING * values[0]).sum())))
    lost = float(values[keep:].square().sum() / values.square().sum().clamp(min=1e-300)) ** 0.5
    left = basis_OR @ (u[:, :keep] * values[:keep])
    right = vh[:keep] @ basis_IR.T
    return Summed(LowRank(left.float(), right.float()), lost)
