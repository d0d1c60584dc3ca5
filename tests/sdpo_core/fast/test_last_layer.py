"""The last layer at the response positions only, against all of it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from sdpo_core import LoraPolicy, LoraSpec, attach_lora
from sdpo_core.fast import decoder
from sdpo_core.fast.packing import pack

PROMPTS, RESPONSES = [(1, 2, 3, 9, 8), (4, 5)], [(6, 7), (8, 2, 3)]


def trained(base: Qwen3ForCausalLM) -> LoraPolicy:
    policy = attach_lora(base.double(), LoraSpec(rank=4, alpha=12))
    with torch.no_grad():
        for i, (_, p) in enumerate(policy.trainable()):
            p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(i))
    return policy


def states_and_gradients(policy: LoraPolicy, checkpointing: bool) -> list[Tensor]:
    batch = pack(PROMPTS, RESPONSES, policy.device)
    hidden_NH = policy.hidden(batch, adapter=True, checkpointing=checkpointing)
    return [hidden_NH, *torch.autograd.grad(hidden_NH.square().sum(), [p for _, p in policy.trainable()])]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_all_rows(
    base: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    policy = trained(base)
    found = states_and_gradients(policy, checkpointing)
    monkeypatch.setattr(decoder, "only_rows", lambda *_: nullcontext())
    for one, other in zip(found, states_and_gradients(policy, checkpointing), strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_last_layer_is_cut_and_all_is_put_back(base: Qwen3ForCausalLM) -> None:
    """Seen by the MLP's activation, which is called with the rows that the MLP computes."""
    policy = trained(base)
    batch = pack(PROMPTS, RESPONSES, policy.device)
    before = [list(m.__dict__) for m in base.modules()]
    rows: list[int] = []
    for layer in base.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _m, _x, made: rows.append(made.shape[1]))
    policy.hidden(batch, adapter=True)
    assert rows == [len(batch.ids_P), len(batch.predicts_N)]
    assert [list(m.__dict__) for m in base.modules()] == before
