"""What cannot be attached is refused by name, and the base is as it was."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5ForConditionalGeneration,
)

from sdpo_core import (
    AdapterError,
    LoraSpec,
    OptionError,
    Options,
    Sample,
    attach_lora,
    attached,
    detach,
    load_ema,
    load_lora,
    load_optimizer,
    make_ema,
    make_optimizer,
    save_ema,
    save_lora,
    save_optimizer,
    train_batch,
)


def untouched(base: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed attempt could leave behind."""
    modules = {name: (id(m), type(m), m.training) for name, m in base.named_modules()}
    weights = {name: (id(p), p.requires_grad, float(p.detach().double().sum())) for name, p in base.named_parameters()}
    return modules, weights, hasattr(base, "peft_config")


def save_fresh(base: PreTrainedModel, directory: Path) -> Path:
    with attached(base, LoraSpec(rank=4)) as policy:
        save_lora(policy, directory, base_model_name_or_path="x")
    base.requires_grad_(True)
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("modules", [("q_proj", "norm"), ("q_proj", "wise_proj")])
def test_a_fresh_adapter_that_fails_half_way_is_taken_off(base: Qwen3ForCausalLM, modules: tuple[str, ...]) -> None:
    """PEFT has adapted the first layers when it comes to one that it cannot adapt."""
    base.train()
    before = untouched(base)
    with pytest.raises(AdapterError):
        attach_lora(base, LoraSpec(target_modules=modules))
    assert untouched(base) == before
    detach(attach_lora(base, LoraSpec()))


@pytest.mark.parametrize("fault", ["layer", "corrupt", "shape", "pissa", "bias", "prompt", "dora"])
def test_a_saved_adapter_that_fails_half_way_is_taken_off(base: Qwen3ForCausalLM, tmp_path: Path, fault: str) -> None:
    save_fresh(base, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    match fault:
        case "layer":
            change_config(tmp_path, target_modules=["q_proj", "norm"])
        case "corrupt":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "shape":
            save_file({n: t[:, :-1].contiguous() for n, t in load_file(weights).items()}, weights)
        case "pissa":
            change_config(tmp_path, init_lora_weights="pissa")
        case "bias":
            change_config(tmp_path, bias="all")
        case "prompt":
            (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}')
        case "dora":
            change_config(tmp_path, use_dora=True)
    before = untouched(base)
    with pytest.raises(AdapterError) as caught:
        load_lora(base, tmp_path)
    assert caught.value.code == "foreign_adapter"
    assert untouched(base) == before
    detach(attach_lora(base, LoraSpec()))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("rank", {"rank": 0}),
        ("rank", {"rank": -1}),
        ("rank", {"rank": 2.0}),
        ("rank", {"rank": True}),
        ("alpha", {"alpha": "16"}),
        ("seed", {"seed": -1}),
        ("target_modules", {"target_modules": "q_proj"}),
        ("target_modules", {"target_modules": ()}),
        ("target_modules", {"target_modules": (1,)}),
    ],
)
def test_the_shape_of_an_adapter_is_checked(option: str, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        LoraSpec(**values)
    assert caught.value.option == option


def test_an_unknown_layer_is_named(base: Qwen3ForCausalLM) -> None:
    with pytest.raises(AdapterError, match="'wise_proj'") as caught:
        attach_lora(base, LoraSpec(target_modules=("q_proj", "wise_proj")))
    assert caught.value.code == "unknown_module"


def test_other_kinds_of_model_are_refused(base: Qwen3ForCausalLM) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for other in (nn.Linear(3, 3), Qwen3Model(base.config), t5):
        before = untouched(other)
        with pytest.raises(AdapterError, match="AutoModelForCausalLM") as caught:
            attach_lora(other, LoraSpec())
        assert caught.value.code == "unsupported_base"
        assert untouched(other) == before


def test_a_base_that_gives_nan_is_refused(base: Qwen3ForCausalLM) -> None:
    with torch.no_grad():
        base.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(AdapterError) as caught:
        attach_lora(base, LoraSpec())
    assert caught.value.code == "base_not_finite"


def test_transposed_layers_are_adapted() -> None:
    """GPT-2's linear layers are of a kind of its own; its adapter is saved, loaded and averaged like any other."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    base = GPT2LMHeadModel(config).eval()
    options = Options(top_k=5, steps=3, stop_gap=0.0, learning_rate=1e-2, teacher="ema")
    samples = [Sample((1, 2, 3), (4, 5, 6), (9, 8, 3))]
    with attached(base, LoraSpec(rank=4)) as policy:
        assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in policy.trainable()} == {"c_attn", "c_proj", "c_fc"}
        ema = make_ema(policy)
        steps = train_batch(policy, make_optimizer(policy, options), samples, options, ema=ema).steps
        assert ema.updates == 1
    assert steps[-1].gap < steps[0].gap


def test_paths_may_be_strings(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    place = str(tmp_path / "v1")
    with attached(base, LoraSpec(rank=4)) as policy:
        save_lora(policy, place, base_model_name_or_path="x")
        save_optimizer(policy, make_optimizer(policy, Options()), place)
        save_ema(make_ema(policy), place)
    with attached(base, place) as policy:
        load_optimizer(policy, Options(), place)
        load_ema(policy, place)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "teacher.safetensors", "optimizer.json", "teacher.json"])
@pytest.mark.parametrize("content", [b"", b"rubbish, not a header", b"[1]", b'{"format": 1, "algorithm": "adamw"}'])
def test_damaged_state_is_refused_by_name(base: Qwen3ForCausalLM, tmp_path: Path, file: str, content: bytes) -> None:
    with attached(base, LoraSpec(rank=4)) as policy:
        save_optimizer(policy, make_optimizer(policy, Options()), tmp_path)
        save_ema(make_ema(policy), tmp_path)
        (tmp_path / file).write_bytes(content)
        load = partial(load_optimizer, policy, Options()) if file.startswith("optimizer") else partial(load_ema, policy)
        with pytest.raises(AdapterError):
            load(tmp_path)


def test_the_average_cannot_follow_an_embedding(base: Qwen3ForCausalLM) -> None:
    with (
        attached(base, LoraSpec(rank=4, target_modules=("embed_tokens", "q_proj"))) as policy,
        pytest.raises(AdapterError, match="embed_tokens") as caught,
    ):
        make_ema(policy)
    assert caught.value.code == "no_moving_average"


class Wordy(Qwen3ForCausalLM):
    """A model that cannot be told how many logits are wanted."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_a_model_that_gives_all_its_logits_is_read_at_the_right_positions(base: Qwen3ForCausalLM) -> None:
    losses = []
    options = Options(top_k=5, steps=1, path="plain", stop_gap=0.0)
    for kind in (Qwen3ForCausalLM, Wordy):
        torch.manual_seed(0)
        model = kind(base.config).eval()
        with attached(model, LoraSpec()) as policy:
            (step,) = train_batch(
                policy, make_optimizer(policy, options), [Sample((1, 2, 3), (4, 5), (9,))], options
            ).steps
            losses.append(step.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # another product of matrices, so another rounding
