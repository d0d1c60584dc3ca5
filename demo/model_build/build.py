"""Builds the demonstration model: `python -m demo.model_build.build --out demo/model`.

Tokenizer, training, measurement, card. About half an hour on two CPU cores; `--steps 20` shows that it runs.
`--measure-only` measures the model that is there again and rewrites its figures and card.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo.model_build.card import write_card
from demo.model_build.measure import measure
from demo.model_build.tokenizer import save_tokenizer, train_tokenizer
from demo.model_build.train import TrainConfig, progress_printer, train

CHECKPOINT_EVERY = 500
FIGURES = "figures.json"


def _trained(config: TrainConfig, out: Path) -> None:
    """Train and save into `out`, with checkpoints on the way so that a broken-off run leaves a model."""
    tokenizer = train_tokenizer(config.seed, config.vocab_size)
    save_tokenizer(tokenizer, out)
    report = progress_printer()

    def on_step(step: int, loss: float, model: Qwen3ForCausalLM) -> None:
        report(step, loss, model)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            model.save_pretrained(out)

    train(config, tokenizer, on_step).save_pretrained(out)


def load(directory: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The model as anybody loads it: by the auto classes, from a local directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), tokenizer


def figures_of(directory: Path, build: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """What is published about the model in `directory`, as written to figures.json."""
    model, tokenizer = load(directory)
    measured = measure(model, tokenizer, prompts).as_json()
    size = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": (directory / "model.safetensors").stat().st_size,
    }
    return {"prompts": prompts, "build": dict(build), "size": size, **measured}


def _publish(directory: Path, figures: Mapping[str, Any]) -> None:
    (directory / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    (directory / "README.md").write_text(write_card(figures))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.model_build.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--threads", type=int, default=TrainConfig.threads)
    parser.add_argument("--prompts", type=int, default=150, help="held-out prompts per probe")
    parser.add_argument("--measure-only", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Build or measure the model as the arguments say."""
    args = _arguments(argv)
    config = TrainConfig(seed=args.seed, steps=args.steps, threads=args.threads)
    build: Mapping[str, Any] = asdict(config)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.measure_only:
        build = json.loads((args.out / FIGURES).read_text())["build"]
    else:
        began = time.perf_counter()
        _trained(config, args.out)
        build = {**build, "training_seconds": round(time.perf_counter() - began)}
    _publish(args.out, figures_of(args.out, build, args.prompts))


if __name__ == "__main__":
    main()
