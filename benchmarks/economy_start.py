"""From a lease to the first step: an adapter and its moments from files, every byte checked, and from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from transformers import Qwen3Config, Qwen3ForCausalLM

from api_schemas.worker import FileEntry, ParentVersion
from sdpo_core import LoraPolicy, LoraSpec, Options, attached, load_optimizer, make_optimizer, save_lora, save_optimizer
from worker.versions import scan, version_digest
from worker.warm import WarmVersions, warm_version

RANKS = (8, 32, 128)
REPETITIONS = 9
Json = dict[str, Any]


def starts(root: Path) -> list[Json]:
    """Figures for adapters of three sizes on a random model: hidden 512, 8 layers."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config).eval()
    return [_start(base, root, rank) for rank in RANKS]


def _start(base: Qwen3ForCausalLM, root: Path, rank: int) -> Json:
    uri, options = f"adp_{rank}/run_1", Options()
    directory, warm = root / uri, WarmVersions(1 << 40)
    with attached(base, LoraSpec(rank=rank)) as policy:
        optimizer = _stepped(policy, options)
        save_lora(policy, directory / "adapter", base_model_name_or_path="base")
        save_optimizer(policy, optimizer, directory / "trainer")
        files = scan(directory)
        parent = ParentVersion(version=1, uri=uri, digest=version_digest(files))
        warm.keep(root, uri, parent.digest, warm_version(policy, "base", optimizer, None))

    def from_files() -> None:
        assert version_digest(scan(directory)) == parent.digest
        with attached(base, directory / "adapter", "") as loaded:
            load_optimizer(loaded, options, directory / "trainer")

    def from_memory() -> None:
        found = warm.find(root, parent)
        assert found is not None
        with attached(base, found.lora, "") as loaded:
            load_optimizer(loaded, options, found.moments)

    return {"rank": rank, "megabytes": _megabytes(files), **_timed({"files": from_files, "memory": from_memory})}


def _stepped(policy: LoraPolicy, options: Options) -> AdamW:
    """An optimizer with moments."""
    optimizer = make_optimizer(policy, options)
    for _, parameter in policy.trainable():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def _megabytes(files: list[FileEntry]) -> float:
    return sum(f.size for f in files) / 1e6


def _timed(calls: dict[str, Callable[[], None]]) -> Json:
    """Medians of calls that take turns; putting the adapter on and off the model is part of both."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(REPETITIONS + 1):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            if turn:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_ms": 1000 * statistics.median(cpu for cpu, _ in each),
            "wall_ms": 1000 * statistics.median(wall for _, wall in each),
        }
        for name, each in times.items()
    }
