"""The fused LoRA layer against PEFT's own, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from sdpo_core import LoraPolicy, LoraSpec, attach_lora
from sdpo_core.fast.lora_linear import _Fused, fused_lora
from sdpo_core.fast.packing import pack


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    bias=st.booleans(),
)
@settings(deadline=None)
def test_value_and_gradients_are_the_formulas(sizes: tuple[int, ...], bias: bool) -> None:
    rows, tokens, width, out, rank = sizes
    draw = torch.Generator().manual_seed(sum(sizes))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    x, a, b = leaf(rows, tokens, width), leaf(rank, width), leaf(out, rank)
    weight, offset = leaf(out, width).detach(), leaf(out).detach() if bias else None
    found = _Fused.apply(x, weight, offset, a, b, 0.7)
    expected = nn.functional.linear(x, weight, offset) + 0.7 * ((x @ a.T) @ b.T)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(y, (x, a, b), slope) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def trained(base: Qwen3ForCausalLM) -> LoraPolicy:
    policy = attach_lora(base, LoraSpec(rank=4, alpha=12))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return policy


def states(policy: LoraPolicy, checkpointing: bool = False) -> Tensor:
    batch = pack([(1, 2, 3), (4, 5)], [(6, 7), (8,)], policy.device)
    return policy.hidden(batch, adapter=True, checkpointing=checkpointing)


def gradients(policy: LoraPolicy, checkpointing: bool) -> list[Tensor]:
    parameters = [p for _, p in policy.trainable()]
    return list(torch.autograd.grad(states(policy, checkpointing).square().sum(), parameters))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fast_path_runs_fused_and_agrees_with_peft(base: Qwen3ForCausalLM, checkpointing: bool) -> None:
    policy = trained(base.double())
    policy.model.double()
    fused = gradients(policy, checkpointing)
    for module in policy.model.modules():
        if hasattr(module, "lora_bias"):
            module.lora_bias["default"] = True  # a layer that does not fit: PEFT's own forward
    for one, other in zip(fused, gradients(policy, checkpointing), strict=True):
        torch.testing.assert_close(one, other)


def test_graph_holds_the_fused_operation(base: Qwen3ForCausalLM) -> None:
    """The layers are fused in hidden states, and are PEFT's own again outside."""
    seen, todo = set(), [states(trained(base)).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    assert sum(type(node).__name__ == "_FusedBackward" for node in seen) == 14  # seven linear layers, two deep


def test_adapter_off_is_the_base_bit_for_bit(base: Qwen3ForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    before = base(input_ids=ids).logits
    policy = trained(base)
    with torch.no_grad(), policy.model.disable_adapter(), fused_lora(policy.model):
        assert torch.equal(policy.model(input_ids=ids).logits, before)
    assert not any("forward" in vars(m) for m in policy.model.modules() if hasattr(m, "lora_A"))
