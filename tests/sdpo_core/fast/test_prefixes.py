"""Reading behind a beginning that was read before gives what reading the whole gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from sdpo_core import BarePolicy
from sdpo_core.fast.prefixes import Read, reads_on
from tests.sdpo_core.fast.test_windows import SHAPE, seeded

ROWS = [
    ((1, 2, 3, 4, 5), (1, 2, 3, 9, 8, 5)),  # they part in the middle
    ((7, 6, 5), (6, 6, 5)),  # at once
    ((1, 2, 3), (1, 2, 3)),  # never
    ((4, 4), (4, 4, 8, 9)),  # the new one goes on as the old one was answered
    ((4, 4, 4, 4), (4, 4)),  # the new one is the old one's beginning
]
ANSWERS = [(8, 9, 1), (2,), (3, 4), (8, 9), (5, 5, 5)]


def models() -> list[PreTrainedModel]:
    small = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return [
        seeded(LlamaForCausalLM, LlamaConfig(**SHAPE)),
        seeded(GPT2LMHeadModel, GPT2Config(**small)),
        seeded(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    ]


@pytest.mark.parametrize("base", models(), ids=lambda m: type(m).__name__)
def test_logits_behind_a_beginning(base: PreTrainedModel) -> None:
    policy = BarePolicy(base)
    assert policy.reads_on
    first, known = policy.read([old for old, _ in ROWS], ANSWERS, None)
    assert [known.common(row, new) for row, (_, new) in enumerate(ROWS)] == [3, 0, 2, 3, 1]
    second, read = policy.read([new for _, new in ROWS], ANSWERS, known)
    _, third = policy.read([old for old, _ in ROWS], ANSWERS, read)
    assert third.rows == known.rows
    for logits, which in ((first, 0), (second, 1)):
        for found_TV, row, answer in zip(logits, ROWS, ANSWERS, strict=True):
            with torch.no_grad():
                whole = base(torch.tensor([[*row[which], *answer]])).logits[0]
            torch.testing.assert_close(found_TV, whole[len(row[which]) - 1 : -1], rtol=1e-4, atol=1e-4)
    assert base.config._attn_implementation == "sdpa"


def test_the_last_token_of_a_prompt_is_always_asked() -> None:
    read = Read([(1, 2, 3)])
    assert [read.common(0, p) for p in ((1, 2, 3), (1, 2, 3, 4), (1,), (2, 2), (1, 2, 9, 9))] == [2, 3, 0, 0, 2]


def test_models_that_cannot_are_not_asked_to() -> None:
    assert not reads_on(seeded(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4)))
    odd: Any = seeded(LlamaForCausalLM, LlamaConfig(**SHAPE))
    for layer in odd.model.layers:
        del layer.self_attn.layer_idx
    assert not reads_on(odd)
    assert odd.config._attn_implementation == "sdpa"
