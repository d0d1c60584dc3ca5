"""A linear layer with its LoRA branch as one operation.

PEFT computes the branch beside the layer: its product is scaled and added over (P, out), and autograd keeps and adds
the parts once more on the way back. Here both branches accumulate into the same product (addmm), forward and backward,
and only the layer's input and the (P, r) middle are kept. The arithmetic is the same; rounding differs in its order.

Shape legend: P tokens (leading dimensions are free), I inputs, O outputs, R rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sdpo_core.fast.forwards import replaced

ADAPTER = "default"


class _Fused(torch.autograd.Function):
    """x W' + b + scale (x A') B'; gradients for x, A and B, none for the frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any, x_PI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        flat_PI = x_PI.reshape(-1, x_PI.shape[-1])
        middle_PR = flat_PI @ a_RI.T
        out_PO = functional.linear(flat_PI, weight_OI, bias_O).addmm_(middle_PR, b_OR.T, alpha=scale)
        ctx.save_for_backward(flat_PI, middle_PR, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        return out_PO.view(*x_PI.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat_PI, middle_PR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_PO = grad.reshape(-1, grad.shape[-1])
        grad_middle_PR = (grad_PO @ b_OR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_PO @ weight_OI).addmm_(grad_middle_PR, a_RI).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_middle_PR.T @ flat_PI, (grad_PO.T @ middle_PR).mul_(ctx.scale), None


def fused_lora(model: nn.Module) -> AbstractContextManager[None]:
    """Run `model`'s LoRA layers fused for the length of a `with` block; where `_fits` says no, as they are."""
    return replaced([(m, MethodType(_forward, m)) for m in model.modules() if isinstance(m, LoraLinear) and _fits(m)])


def _fits(layer: Any) -> bool:
    """One plain LoRA adapter on a plain linear layer, all of one dtype (4-bit weights and mixed dtypes are PEFT's)."""
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and layer.active_adapters == [ADAPTER]
        and ADAPTER in layer.lora_A
        and not layer.lora_bias.get(ADAPTER, False)
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and base.weight.dtype == layer.lora_A[ADAPTER].weight.dtype == layer.lora_B[ADAPTER].weight.dtype
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of the layer's own forward, which is asked where the adapter is off or merged."""
    base, weight = layer.get_base_layer(), layer.lora_A[ADAPTER].weight
    if layer.disable_adapters or layer.merged or kwargs or args or x.dtype != weight.dtype:
        found: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return found
    fused: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    )
    return fused
