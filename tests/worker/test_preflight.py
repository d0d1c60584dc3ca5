"""The memory plan against what real training takes, and its refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sdpo_core.lora import LoraSpec, attach_lora
from sdpo_core.optimizer import make_optimizer
from sdpo_core.options import Options
from worker import memory as m
from worker.errors import DoesNotFitError
from worker.machine import Memory, gpu_memory, host_memory
from worker.preflight import Plan, checked, dtype_bytes, main, of_ranks, parse, plan_of, refuse_quantise

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo/model"
GIB = m.GIB

QWEN3_8B = m.ModelShape(
    hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, vocabulary=151936, window=40960,
    parameters=8_190_735_360, layer_matrices=36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288),
)  # fmt: skip
FOUR_BIT = m.Training("cuda", 2, "4bit", rank=32, batch_tokens=8192, response_tokens=2048)


def small(**changes: int) -> Qwen3Config:
    shape = {
        "vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    }  # fmt: skip
    return Qwen3Config(tie_word_embeddings=False, **(shape | changes))


def shape_of(config: Qwen3Config) -> m.ModelShape:
    return m.ModelShape(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, config.max_position_embeddings, 0, 0,
    )  # fmt: skip


def saved_bytes(config: Qwen3Config, dtype: torch.dtype, rank: int, tokens: int) -> int:
    """What autograd really keeps of one forward pass, parameters left out."""
    policy = attach_lora(Qwen3ForCausalLM(config).to(dtype), LoraSpec(rank=rank))
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones((1, tokens), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 256}, {"intermediate_size": 512}, {"num_key_value_heads": 6}])
def test_activations_are_what_autograd_keeps(changes: dict[str, int], dtype: torch.dtype, width: int) -> None:
    tokens, rank = 96, 12
    config = small(**changes)
    two, three = (saved_bytes(small(**changes, num_hidden_layers=n), dtype, rank, tokens) for n in (2, 3))
    assert m.activation_bytes(shape_of(config), width, rank, adapted=7) == pytest.approx(
        (three - two) / tokens, rel=0.03
    )


def test_adapter_and_optimizer_are_counted_exactly() -> None:
    config = small()
    policy = attach_lora(Qwen3ForCausalLM(config), LoraSpec(rank=5))
    weights = [p for _, p in policy.trainable()]
    assert m.adapter_weights(shape_of(config), 5) == sum(p.numel() for p in weights)
    optimizer = make_optimizer(policy, Options())
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    in_all = state + sum(2 * p.nbytes for p in weights)
    assert m.LORA_STATE_BYTES * m.adapter_weights(shape_of(config), 5) == in_all


def test_the_shape_is_read_from_the_files() -> None:
    shape = m.read_shape(DEMO)
    assert (shape.hidden, shape.layers, shape.vocabulary, shape.window) == (128, 4, 2176, 1024)
    assert shape.parameters * 4 == pytest.approx((DEMO / "model.safetensors").stat().st_size, rel=0.01)
    assert shape.layer_matrices == 4 * sum(a * b for a, b in shape.modules().values())
    assert Options().micro_batch_tokens == m.Training("cpu", 4).batch_tokens


def test_what_is_no_model_has_no_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ValueError, match="no safetensors file"):
        m.read_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="header of"):
        m.read_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="intermediate_size"):
        m.read_shape(tmp_path)


BIGGER = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["demo", "bigger"])
def test_the_plan_of_a_real_training_is_near_its_peak(name: str, dtype: str, tmp_path: Path) -> None:
    """Never less than the peak of resident memory, and at most 1.6 times as much."""
    model = DEMO
    if name == "bigger":
        model = tmp_path
        Qwen3ForCausalLM(small(**BIGGER)).save_pretrained(model)
    prompt, response, rows = 256, 256, 6
    numbers = [str(n) for n in (16, prompt, response, rows)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/worker/peak.py"), str(model), dtype, *numbers],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    before, peak = (int(n) for n in done.stdout.split())
    shape, width = m.read_shape(model), dtype_bytes(dtype, "cpu")
    shape = replace(shape, window=prompt + response)
    training = m.Training("cpu", width, rank=16, batch_tokens=rows * 512, response_tokens=rows * response, path="plain")
    planned, real = sum(m.training_needs(shape, training).values()), before + peak
    print(f"{name} {dtype}: planned {planned / 1e6:.0f} MB, resident at most {real / 1e6:.0f} MB")
    assert real <= planned <= 1.6 * real


def gpu(free: float, *flags: str) -> tuple[Plan, m.Training]:
    options = parse(["--model", "x", "--device", "cuda", "--max-lora-rank", "32", "--max-model-len", "8192", *flags])
    return plan_of(options, replace(QWEN3_8B, window=8192), Memory(80 * GIB, int(free * GIB)))


def test_an_8b_model_and_vllm_share_80_gib_with_4_bit_weights() -> None:
    needs = m.training_needs(replace(QWEN3_8B, window=8192), FOUR_BIT)
    assert needs["base"] == pytest.approx(6.1 * GIB, rel=0.1)  # layers at 4 bits, embedding and head in bfloat16
    assert m.base_bytes(QWEN3_8B, 2, "none") == pytest.approx(15.3 * GIB, rel=0.01)
    assert m.kv_bytes(QWEN3_8B, 2) == 147_456  # 144 KiB per token


SPLIT = ["--quantise", "4bit", "--batch-tokens", "2048"]


@pytest.mark.parametrize(
    ("free", "flags", "advice"),
    [
        (79, ["--gpu-memory-utilization", "0.9", *SPLIT], "set --gpu-memory-utilization to 0."),
        (79, ["--gpu-memory-utilization", "0.1", *SPLIT], "vLLM needs"),
        (40, ["--trainer-only", "--batch-tokens", "2048"], "use --quantise 4bit"),
        (79, ["--trainer-only"], "use --batch-tokens 4096"),
        (20, ["--trainer-only"], "use --quantise 4bit and --batch-tokens"),
        (6, ["--trainer-only"], "are missing"),
        (79, ["--gpu-memory-utilization", "0.45", *SPLIT], None),
        (79, ["--trainer-only", "--batch-tokens", "4096"], None),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers_and_what_to_change(
    free: float, flags: list[str], advice: str | None
) -> None:
    plan, training = gpu(free, *flags)
    shape = replace(QWEN3_8B, window=8192)
    if advice is None:
        assert checked(plan, shape, training) is plan
        return
    with pytest.raises(DoesNotFitError, match=r"does_not_fit: .*GiB") as refused:
        checked(plan, shape, training)
    assert advice in str(refused.value)
    assert "80.00 GiB" in str(refused.value)


def test_advice_that_is_followed_fits() -> None:
    shape = replace(QWEN3_8B, window=8192)
    for given, flag in (("0.9", "--gpu-memory-utilization to "), (None, "--batch-tokens ")):
        flags = [*SPLIT, "--gpu-memory-utilization", given] if given else ["--trainer-only"]
        plan, training = gpu(79, *flags)
        with pytest.raises(DoesNotFitError) as refused:
            checked(plan, shape, training)
        better = str(refused.value).split(flag)[1].split()[0]
        change = ["--gpu-memory-utilization", better] if given else ["--batch-tokens", better]
        assert gpu(79, *flags, *change)[0].fits


def test_ranks_share_main_memory_and_have_a_gpu_each() -> None:
    needs = {"base": 10, "activations": 4}
    assert of_ranks(needs, "cpu", 2, shard=False) == {"base": 20, "activations": 8}
    assert of_ranks(needs, "cpu", 2, shard=True) == {"base": 20, "activations": 8}, "each loads it whole"
    assert of_ranks(needs, "cuda", 2, shard=False) == needs
    assert of_ranks(needs, "cuda", 2, shard=True) == {"base": 5, "activations": 4}


def test_4_bit_is_refused_by_name_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DoesNotFitError, match="quantise 4bit needs an NVIDIA GPU"):
        refuse_quantise("4bit", "cpu")
    assert main(["--model", str(DEMO), "--device", "cpu", "--quantise", "4bit"]) == 1
    assert "quantise 4bit" in capsys.readouterr().err


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--model", str(DEMO), "--device", "cpu"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main(["--model", str(DEMO), "--device", "cpu", "--batch-tokens", "100000000"]) == 1
    assert "does_not_fit: " in capsys.readouterr().err
    assert main(["--model", str(tmp_path)]) == 2


def test_memory_is_read_from_the_system(tmp_path: Path) -> None:
    found = host_memory()
    assert found is not None
    assert 0 < found.free <= found.total
    assert host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemFree: 5 kB\nMemAvailable: 1500 kB\n")
    assert host_memory(tmp_path) == Memory(2048000, 1536000)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("400000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert host_memory(tmp_path) == Memory(1000000, 700000)
    (group / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == Memory(2048000, 1536000)


def test_a_gpu_is_asked_for_by_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo "81559, 80000";; *) exit 1;; esac\n')
    tool.chmod(0o755)
    assert gpu_memory([str(tool)]) == Memory(81559 * 2**20, 80000 * 2**20)
    assert gpu_memory([str(tmp_path / "absent")]) is None
