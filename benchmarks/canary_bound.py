"""How far a bfloat16 vLLM's log-probs lie from the trainer's: what the canary's bound must allow.

`python -m benchmarks.canary_bound [--dtype bfloat16] [--vllm URL]` scores the same tokens under the same versions in a
real vLLM and, with the worker's own function, on a float32 and a bfloat16 base; it prints the largest difference of
one log-prob for each, and how far the versions are from the base: what the canary must still tell apart.

Versions: random factors of three sizes. Tokens: the service's own canary prompt, and long ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gateway import MODEL, MODEL_DIR, REPORT, real_engine
from sdpo_core.lora import attached
from service.engine_client import EngineClient
from service.settings import CANARY_PROMPT
from tests.vllm.server import VllmConfig, VllmServer
from tests.vllm.tenant import config, long_prompt, weights
from worker.base_model import BaseModel, load_base
from worker.canary import canary_ids, score
from worker.settings import Dtype

SIZES = (0.02, 0.06, 0.12)
SEEDS = range(4)
PROMPTS = [CANARY_PROMPT, *(long_prompt(i, words) for i, words in ((1, 60), (2, 130), (3, 200)))]
Scores = dict[tuple[str, int], list[float]]
"""By version and prompt: log-probs of the prompt's tokens."""


@dataclass(frozen=True)
class Version:
    name: str
    size: float
    path: Path


def versions(root: Path, sizes: Sequence[float] = SIZES, seeds: Sequence[int] = SEEDS) -> list[Version]:
    """PEFT directories under `root`; size 0 is the base model's equal."""
    made = []
    for size in sizes:
        for seed in seeds:
            path = root / f"v-{size}-{seed}"
            path.mkdir()
            (path / "adapter_config.json").write_bytes(config())
            (path / "adapter_model.safetensors").write_bytes(weights(seed, size))
            made.append(Version(f"{root.name}-{path.name}", size, path))
    return made


def trainers(base: BaseModel, made: list[Version], prompts: list[list[int]]) -> Scores:
    found: Scores = {}
    for version in made:
        with attached(base.module, version.path) as policy:
            found |= {(version.name, i): score(policy, ids) for i, ids in enumerate(prompts)}
    return found


async def engines(url: str, made: list[Version], prompts: list[list[int]]) -> Scores:
    found: Scores = {}
    async with EngineClient(url) as engine:
        for i, ids in enumerate(prompts):
            found[MODEL, i] = await engine.score_prompt(MODEL, ids)
        for version in made:
            await engine.load(version.name, str(version.path))
            found |= {(version.name, i): await engine.score_prompt(version.name, ids) for i, ids in enumerate(prompts)}
            await engine.unload(version.name)
    return found


def differences(a: Scores, b: Scores, made: list[Version]) -> list[np.ndarray]:
    """Per version and prompt, of each token."""
    return [np.abs(np.subtract(a[v.name, i], b[v.name, i])) for v in made for i in range(len(PROMPTS))]


def shown(parts: list[np.ndarray]) -> dict[str, float]:
    every = np.concatenate(parts)
    return {
        "max": round(float(every.max()), 7),
        "p99": round(float(np.quantile(every, 0.99)), 7),
        "largest_rms_of_a_prompt": round(float(max(np.sqrt(np.square(p).mean()) for p in parts)), 7),
        "largest_of_first_prompt": round(float(max(p.max() for p in parts[:: len(PROMPTS)])), 7),
    }


@contextmanager
def engine_of(options: argparse.Namespace, logs: Path) -> Iterator[str]:
    if options.vllm:
        with real_engine(options.vllm) as url:
            yield url
    else:
        with VllmServer(VllmConfig(MODEL_DIR, MODEL, logs / "log", flags=("--dtype", options.dtype))) as server:
            yield server.url


def main() -> None:
    parser = argparse.ArgumentParser(description="Log-probs of a real vLLM against the trainer's, in both types.")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of our own vLLM")
    parser.add_argument("--vllm", metavar="URL", help="one that runs already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        made = versions(Path(place))
        kinds: tuple[Dtype, ...] = ("float32", "bfloat16")
        bases = {kind: load_base(MODEL_DIR, MODEL, "cpu", kind) for kind in kinds}
        prompts = [canary_ids(bases["float32"], prompt) for prompt in PROMPTS]
        by_kind = {kind: trainers(base, made, prompts) for kind, base in bases.items()}
        with engine_of(options, Path(place)) as url:
            served = asyncio.run(engines(url, made, prompts))
    report: dict[str, object] = {"tokens": [len(p) for p in prompts], "versions": len(made)}
    for kind, found in by_kind.items():
        report[f"{kind} trainer"] = shown(differences(found, served, made))
        for size in SIZES:
            sized = [v for v in made if v.size == size]
            report[f"{kind} trainer, size {size}"] = shown(differences(found, served, sized))
    for size in SIZES:
        own = [
            np.abs(np.subtract(served[v.name, i], served[MODEL, i])) for v in made if v.size == size for i in range(4)
        ]
        rms = min(float(np.sqrt(np.square(o).mean())) for o in own)
        report[f"version to base, size {size}"] = {"least_rms": round(rms, 3)}
    target = REPORT.with_name(f"canary_{options.dtype}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
