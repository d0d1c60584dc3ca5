"""Other models on the fast path: attention windows of any width, learned positions, attention of their own."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from sdpo_core import LoraSpec, Options, Sample, StepMetrics, attached, make_optimizer, train_batch
from sdpo_core.fast.windows import narrow_windows

SAMPLES = [Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, i)) for i in range(6)]
"""54 teacher tokens packed: more than the 32 positions of the models below."""


def steps(base: PreTrainedModel, path: str) -> tuple[StepMetrics, ...]:
    options = Options(top_k=5, steps=2, stop_gap=0.0, learning_rate=1e-3, path=path)  # type: ignore[arg-type]
    with attached(base, LoraSpec(rank=4, seed=1)) as policy:
        return train_batch(policy, make_optimizer(policy, options), SAMPLES, options).steps


def seeded(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).eval()


SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 8192, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("window", [4, 9, 600, 4096])
def test_a_window_of_any_width_is_tried_out(window: int) -> None:
    base = seeded(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=window))
    fast, plain = steps(base, "fast"), steps(base, "plain")
    assert [s.fallback_reason for s in fast] == ["", ""]
    assert [s.loss for s in fast] == pytest.approx([s.loss for s in plain], rel=1e-4)
    assert base.config.sliding_window == window


def test_a_window_that_cannot_be_narrowed_is_left_to_the_plain_path() -> None:
    """Layers that keep their width elsewhere: on a few tokens nobody would see whether packing knows it."""
    base = seeded(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None))
    base.config.layer_types = None
    base.config.__dict__["attention_chunk_size"] = 1024  # nothing in this model reads it
    assert "cannot be tried out" in steps(base, "fast")[0].fallback_reason


def test_windows_come_back_when_something_fails() -> None:
    base = seeded(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=600))
    seen = []
    with contextlib.suppress(KeyError), narrow_windows(base):
        seen.append(base.config.sliding_window)
        raise KeyError
    assert seen == [8]
    assert base.config.sliding_window == 600


def test_learned_positions_are_those_of_each_sequence() -> None:
    """A packed row longer than the table of positions."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    base = seeded(GPT2LMHeadModel, config)
    fast, plain = steps(base, "fast"), steps(base, "plain")
    assert [s.path for s in fast] == ["fast", "fast"]
    assert [s.loss for s in fast] == pytest.approx([s.loss for s in plain], rel=1e-4)


NEO = GPTNeoConfig(
    vocab_size=64, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
    window_size=8, max_position_embeddings=32,
)  # fmt: skip
GPT_J = GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, rotary_dim=4)


@pytest.mark.parametrize(("kind", "config"), [(GPTNeoForCausalLM, NEO), (GPTJForCausalLM, GPT_J)])
def test_attention_of_a_models_own_is_left_to_the_plain_path(kind: type[PreTrainedModel], config: Any) -> None:
    """It would see across packed sequences: with small random weights by too little to notice in the numbers."""
    base = seeded(kind, config)
    for step in steps(base, "auto"):
        assert step.path == "plain"
        assert "attention" in step.fallback_reason
