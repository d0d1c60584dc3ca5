"""LoRA for batches whose rows use different adapters.

Every `nn.Linear` of the base model is wrapped once. Before each forward the runner says which rows use which weights;
the wrapper adds `B A x * scaling` for those rows only (Hu et al. 2021, arXiv:2106.09685). Weights are immutable and
requests hold a reference to them, so unloading or loading a name never touches a running request.

Shapes: B rows of the batch, T tokens, I in-features, O out-features, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The weights of one adapter; compared by identity, never changed after construction.

    `pairs` maps a module name of the base model to (a_RI, b_OR), with the scaling folded into b_OR.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))


@dataclass(frozen=True)
class RowGroup:
    """Rows of the current batch that share an adapter; `rows` (N,) is None when that is every row."""

    weights: LoraWeights
    rows: Tensor | None


class LoraBatch:
    """Which rows of the current forward use which adapter. Written by the runner, read by every wrapped layer."""

    def __init__(self) -> None:
        self.groups: tuple[RowGroup, ...] = ()
        self.size = 0

    def assign(self, weights_B: Sequence[LoraWeights | None], device: torch.device) -> None:
        """Set the adapters of the next forward, row by row; None is the base model."""
        self.size = len(weights_B)
        rows: dict[LoraWeights, list[int]] = {}
        for row, weights in enumerate(weights_B):
            if weights is not None:
                rows.setdefault(weights, []).append(row)
        self.groups = tuple(
            RowGroup(weights, None if len(own) == len(weights_B) else torch.tensor(own, device=device))
            for weights, own in rows.items()
        )


class MultiLoraLinear(nn.Module):
    """A linear layer of the base model plus, per row of the batch, the update of that row's adapter."""

    def __init__(self, name: str, base: nn.Linear, batch: LoraBatch) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.batch = batch

    @property
    def weight(self) -> Tensor:
        """The base weight; some model code looks at its dtype or device."""
        return self.base.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO: Tensor = self.base(x_BTI)
        for group in self.batch.groups:
            pair = group.weights.pairs.get(self.name)
            if pair is None:
                continue
            if x_BTI.ndim != 3 or x_BTI.shape[0] != self.batch.size:
                raise RuntimeError(f"{self.name} does not see one row per request: LoRA cannot be applied to it.")
            a_RI, b_OR = pair
            if group.rows is None:
                y_BTO = y_BTO + functional.linear(functional.linear(x_BTI, a_RI), b_OR)
            else:
                x_NTI = x_BTI.index_select(0, group.rows)
                y_BTO.index_add_(0, group.rows, functional.linear(functional.linear(x_NTI, a_RI), b_OR))
        return y_BTO


def install_lora(model: nn.Module) -> tuple[LoraBatch, dict[str, tuple[int, int]]]:
    """Wrap every linear layer of `model` in place.

    Returns the batch description the layers read, and the (O, I) of each layer that an adapter may target.
    """
    batch = LoraBatch()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, MultiLoraLinear(name, module, batch))
            shapes[name] = (module.out_features, module.in_features)
    return batch, shapes
