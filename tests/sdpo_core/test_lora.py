"""Adapters come and go; the base model never changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import (
    AdapterError,
    LoraPolicy,
    LoraSpec,
    Options,
    Sample,
    attach_lora,
    attached,
    detach,
    explain,
    load_lora,
    load_optimizer,
    make_ema,
    make_optimizer,
    save_lora,
    save_optimizer,
    train_batch,
)
from sdpo_core.samples import token_batch

IDS = torch.tensor([[1, 5, 9, 2, 40, 3]])
OPTIONS = Options(top_k=6, steps=2, stop_gap=0.0, learning_rate=1e-2)
SAMPLES = [Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3)), Sample((1, 4, 4), (4, 5), (1, 9, 8), (-1.0, -2.0))]


def train(policy: LoraPolicy) -> None:
    assert train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS).updates == 2


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def state(policy: LoraPolicy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable()}


def test_base_is_bit_identical_after_a_job(base: Qwen3ForCausalLM) -> None:
    before, names = logits(base), list(base.state_dict())
    bits = {name: value.clone() for name, value in base.state_dict().items()}
    with attached(base, LoraSpec()) as policy:
        train(policy)
        assert not torch.equal(logits(policy.model), before)
    assert torch.equal(logits(base), before)
    assert list(base.state_dict()) == names
    assert all(torch.equal(bits[name], value) for name, value in base.state_dict().items())
    assert not hasattr(base, "peft_config")


def test_base_comes_back_after_a_failing_job(base: Qwen3ForCausalLM) -> None:
    before = logits(base)

    def dying_job() -> None:
        with attached(base, LoraSpec()) as policy:
            train(policy)
            raise RuntimeError("job died")

    with pytest.raises(RuntimeError, match="job died"):
        dying_job()
    assert torch.equal(logits(base), before)
    detach(attach_lora(base, LoraSpec()))


def test_fresh_adapter_is_the_base_and_its_seed_decides(base: Qwen3ForCausalLM) -> None:
    before = logits(base)
    states = []
    for seed in (1, 1, 2):
        random_state = torch.get_rng_state()
        with attached(base, LoraSpec(seed=seed)) as policy:
            assert torch.equal(torch.get_rng_state(), random_state)
            assert torch.equal(logits(policy.model), before)
            states.append(state(policy))
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    assert all(bool((v == 0).all()) for n, v in states[0].items() if ".lora_B." in n)


def test_every_linear_layer_but_the_head_is_adapted_and_only_the_adapter_trains(base: Qwen3ForCausalLM) -> None:
    with attached(base, LoraSpec()) as policy:
        names = {n.split(".lora_")[0] for n, _ in policy.trainable()}
        assert len(names) == 2 * 7
        assert not any("lm_head" in n for n in names)
        trains = {id(p) for p in policy.model.parameters() if p.requires_grad}
        assert trains == {id(p) for _, p in policy.trainable()}


def test_teacher_pass_is_really_the_base(base: Qwen3ForCausalLM) -> None:
    """With a trained adapter on board: base logits to the bit, no gradient; and the student's differ."""
    batch = token_batch([[1, 5, 9]], [[2, 40, 3]], torch.device("cpu"))
    before = logits(base)[:, batch.first_logit :]
    with attached(base, LoraSpec()) as policy:
        train(policy)
        teacher = policy.logits(batch, adapter=False)
        assert torch.equal(teacher, before)
        assert not teacher.requires_grad
        student = policy.logits(batch, adapter=True)
        assert student.requires_grad
        assert not torch.equal(student.detach(), teacher)
        assert all(p.requires_grad for _, p in policy.trainable())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_saved_adapter_loads_in_peft_and_here(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    with attached(base, LoraSpec(rank=4, alpha=8)) as policy:
        train(policy)
        want, weights = logits(policy.model), state(policy)
        save_lora(policy, tmp_path / "v1", base_model_name_or_path="org/tiny")
    assert sorted(p.name for p in (tmp_path / "v1").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "v1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    keys = set(load_file(tmp_path / "v1" / "adapter_model.safetensors"))
    with attached(base, tmp_path / "v1") as again:
        assert torch.equal(logits(again.model), want)
        assert all(torch.equal(weights[n], v) for n, v in state(again).items())
        assert {n for n, _ in again.trainable()} == keys
        train(again)
    foreign = PeftModel.from_pretrained(base, str(tmp_path / "v1"))
    torch.testing.assert_close(logits(foreign), want, atol=1e-6, rtol=0)
    foreign.unload()


def test_jobs_do_not_leak_into_each_other(base: Qwen3ForCausalLM) -> None:
    """Job B gives the same bits alone, after job A, and after A again."""

    def job(seed: int) -> dict[str, Tensor]:
        with attached(base, LoraSpec(seed=seed)) as policy:
            train(policy)
            return state(policy)

    alone = job(7)
    job(1)
    job(2)
    after = job(7)
    assert all(torch.equal(alone[n], after[n]) for n in alone)


def test_two_adapters_at_once_are_refused(base: Qwen3ForCausalLM) -> None:
    with attached(base, LoraSpec()), pytest.raises(AdapterError, match="detach"):
        attach_lora(base, LoraSpec())


@pytest.mark.parametrize("fault", ["no_weights", "no_config", "extra_key", "missing_key", "shape", "nan", "rubbish"])
def test_foreign_adapters_are_refused_and_leave_the_base_alone(
    base: Qwen3ForCausalLM, tmp_path: Path, fault: str
) -> None:
    before = logits(base)
    with attached(base, LoraSpec()) as policy:
        save_lora(policy, tmp_path, base_model_name_or_path="x")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    if fault == "no_weights":
        path.unlink()
    elif fault == "no_config":
        (tmp_path / "adapter_config.json").unlink()
    elif fault == "rubbish":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "NONSENSE"}')
    else:
        changes = {
            "extra_key": {"base_model.model.other.lora_A.weight": torch.zeros(1)},
            "missing_key": {},
            "shape": {first: torch.zeros(3, 3)},
            "nan": {first: tensors[first] * float("nan")},
        }[fault]
        if fault == "missing_key":
            del tensors[first]
        save_file({**tensors, **changes}, path)
    with pytest.raises(AdapterError):
        load_lora(base, tmp_path)
    assert torch.equal(logits(base), before)
    detach(attach_lora(base, LoraSpec()))


def test_optimizer_state_is_restored_by_name_and_the_requested_rate_wins(
    base: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    with attached(base, LoraSpec()) as policy:
        optimizer = make_optimizer(policy, OPTIONS)
        train_batch(policy, optimizer, SAMPLES, OPTIONS)
        save_optimizer(policy, optimizer, tmp_path)
        wanted = OPTIONS.replace(learning_rate=1e-4, betas=(0.8, 0.9), weight_decay=0.1)
        again = load_optimizer(policy, wanted, tmp_path)
        group = again.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.8, 0.9), 0.1)
        for _, parameter in policy.trainable():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(again.state[parameter][key], optimizer.state[parameter][key])
        result = train_batch(policy, again, SAMPLES, wanted)
        assert {m.learning_rate for m in result.steps} == {1e-4}
        before = state(policy)
        train_batch(policy, again, SAMPLES, wanted.replace(steps=1))
        moved = max(float((p.detach() - before[n]).abs().max()) for n, p in policy.trainable())
        assert moved < 1e-3  # Adam moves a weight by about its rate; at the saved rate it would be 1e-2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]


def test_optimizer_state_of_another_adapter_is_refused(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    with attached(base, LoraSpec(rank=4)) as policy:
        optimizer = make_optimizer(policy, OPTIONS)
        train_batch(policy, optimizer, SAMPLES, OPTIONS)
        save_optimizer(policy, optimizer, tmp_path / "four")
    with attached(base, LoraSpec(rank=8)) as policy, pytest.raises(AdapterError, match="shape"):
        load_optimizer(policy, OPTIONS, tmp_path / "four")
    with attached(base, LoraSpec(rank=4, target_modules=("q_proj",))) as policy:
        with pytest.raises(AdapterError, match="lacks"):
            load_optimizer(policy, OPTIONS, tmp_path / "four")
        with pytest.raises(AdapterError, match="no readable"):
            load_optimizer(policy, OPTIONS, tmp_path / "nowhere")
    shutil.copytree(tmp_path / "four", tmp_path / "odd")
    (tmp_path / "odd" / "optimizer.json").write_text('{"format": 99, "steps": {}}')
    with attached(base, LoraSpec(rank=4)) as policy, pytest.raises(AdapterError, match="format"):
        load_optimizer(policy, OPTIONS, tmp_path / "odd")


def test_a_policy_is_over_when_its_adapter_is_off(
    base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What is left would answer, and be saved, as the base, without a word."""
    with attached(base, LoraSpec()) as policy:
        optimizer = make_optimizer(policy, OPTIONS)
    for use in (
        lambda: save_lora(policy, tmp_path / "late", base_model_name_or_path="base"),
        lambda: save_optimizer(policy, optimizer, tmp_path / "late"),
        lambda: make_ema(policy),
        lambda: explain(policy, tokenizer, SAMPLES, OPTIONS),
        lambda: train_batch(policy, optimizer, SAMPLES, OPTIONS),
        lambda: policy.logits(token_batch([[1]], [[2]], policy.device), adapter=False),
    ):
        with pytest.raises(AdapterError) as caught:
            use()
        assert caught.value.code == "adapter_detached"
    assert not (tmp_path / "late" / "adapter_model.safetensors").exists()
