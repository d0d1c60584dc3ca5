"""The runner: which models it takes, and half precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, Qwen3Config, Qwen3MoeConfig

from worker.engine.engine import Engine
from worker.engine.errors import UnsupportedModelError
from worker.engine.lora import LoraBatch, LoraWeights, MultiLoraLinear
from worker.engine.runner import ModelRunner, Row, check_config


def test_context_length_is_the_models_unless_less_is_asked_for() -> None:
    config = Qwen3Config(max_position_embeddings=4096)
    assert check_config(config, None) == 4096
    assert check_config(config, 100) == 100
    for wrong in (0, 4097):
        with pytest.raises(UnsupportedModelError, match=r"1\.\.4096"):
            check_config(config, wrong)


def test_sliding_windows_are_served_only_where_they_do_not_matter() -> None:
    config = MistralConfig(max_position_embeddings=8192, sliding_window=1024)
    with pytest.raises(UnsupportedModelError, match="1024 or less"):
        check_config(config, None)
    assert check_config(config, 1024) == 1024


@pytest.mark.parametrize(
    "config", [Qwen3MoeConfig(), Qwen3Config(layer_types=["linear_attention"], num_hidden_layers=1)]
)
def test_models_for_vllm_only(config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="use vLLM"):
        check_config(config, None)


def test_bfloat16_stays_near_the_fp32_reference(
    start_engine: Callable[..., Engine], model_dir: Path, make_adapter: Callable[..., Path], reference: Any, submit: Any
) -> None:
    engine = start_engine(model_dir, dtype="bfloat16")
    path = make_adapter("v1", size=0.1)
    engine.load_adapter("v1", str(path))
    running = submit(engine, model="v1", max_tokens=30)
    steps = running.rest()
    ids = [step.token_id for step in steps]
    expected = reference.logprobs(list(running.generation.prompt_ids), ids, path)[range(30), ids]
    gap = (torch.tensor([step.logprob for step in steps]) - expected).abs()
    assert gap.mean() < 0.05
    assert gap.max() < 0.4


@torch.inference_mode()
def test_padding_and_slots_do_not_change_logits(runner: ModelRunner) -> None:
    short, long = Row([9, 8, 7], 0, None), Row(list(range(20, 60)), 0, None)
    together = runner.forward(1, [short, long])
    runner.cache.clear()
    for slot, row in enumerate((short, long)):
        alone = runner.forward(slot, [row])[0]
        assert torch.allclose(together[slot], alone, atol=1e-5)


def test_layer_that_does_not_see_rows_refuses_adapters() -> None:
    batch = LoraBatch()
    layer = MultiLoraLinear("layer", nn.Linear(3, 2), batch)
    weights = LoraWeights({"layer": (torch.ones(1, 3), torch.ones(2, 1))})
    batch.assign([weights, None], torch.device("cpu"))
    flattened_NI = torch.ones(10, 3)  # as a mixture of experts would pass its tokens
    with torch.no_grad(), pytest.raises(RuntimeError, match="one row per request"):
        layer(flattened_NI)
