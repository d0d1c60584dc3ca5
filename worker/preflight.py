"""Will it fit? `perennial preflight` says before anything big starts: a plan in numbers, or a refusal with numbers.

Exit status: 0 it fits, 1 it does not (`does_not_fit`), 2 wrong arguments or no plan for this model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from worker.errors import DoesNotFitError
from worker.machine import Memory, gpu_memory, host_memory
from worker.memory import (
    GIB,
    ModelShape,
    Serving,
    Training,
    kv_bytes,
    read_shape,
    serving_needs,
    training_needs,
)
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)
LEAST_TOKENS = 256
"""Micro-batches that are smaller are not worth proposing."""
EMBEDDED_BYTES = 600 * 2**20
"""The embedded engine's process."""


@dataclass(frozen=True)
class Plan:
    """Bytes that are needed, by purpose, against what is there."""

    place: str
    memory: Memory
    trainer: dict[str, int]
    engine: dict[str, int]
    """Empty: not planned here, e.g. it runs already or elsewhere."""
    share: int | None = None
    """Bytes that vLLM takes whatever it needs: its --gpu-memory-utilization of the whole."""

    @property
    def engine_bytes(self) -> int:
        return max(sum(self.engine.values()), self.share or 0)

    @property
    def needed(self) -> int:
        return sum(self.trainer.values()) + self.engine_bytes

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory.free and (self.share is None or sum(self.engine.values()) <= self.share)

    def lines(self) -> list[str]:
        """The plan as a table, GiB."""
        rows = [f"{self.place}: {_gib(self.memory.free)} free of {_gib(self.memory.total)}"]
        for who, needs in (("engine", self.engine), ("trainer", self.trainer)):
            rows += [f"  {who:8} {what:22} {_gib(size):>12}" for what, size in needs.items()]
        if self.share is not None:
            rows.append(f"  {'engine':8} {'its share, in all':22} {_gib(self.share):>12}")
        return [*rows, f"  {'needed, in all':31} {_gib(self.needed):>12}"]


def refusal(plan: Plan, shape: ModelShape, training: Training) -> str:
    """Why a plan that does not fit does not, and what to change."""
    trainer, engine = sum(plan.trainer.values()), sum(plan.engine.values())
    if plan.share is not None and engine > plan.share:
        least = engine / plan.memory.total
        problem = f"vLLM needs {_gib(engine)} but its share is {_gib(plan.share)}"
        if engine + trainer <= plan.memory.free:
            return f"{problem}: set --gpu-memory-utilization to {least + 0.005:.2f} or more"
    else:
        problem = f"{_gib(plan.needed)} are needed and {_gib(plan.memory.free)} are free"
    room = (plan.memory.free - trainer) / plan.memory.total
    if plan.share is not None and engine <= room * plan.memory.total:
        return f"{problem}: set --gpu-memory-utilization to {int(room * 100) / 100:.2f} or less"
    return f"{problem}: {_advice(plan, shape, training)}"


def _advice(plan: Plan, shape: ModelShape, training: Training) -> str:
    """The first change to the trainer that makes room, else what is missing."""
    left = plan.memory.free - sum(plan.engine.values())
    lower = " and lower --gpu-memory-utilization" if plan.share is not None else ""
    quantised = replace(training, quantise="4bit")
    if training.device == "cuda" and sum(training_needs(shape, quantised).values()) <= left:
        return f"use --quantise 4bit{lower}"
    for words, changed in [("", training), ("--quantise 4bit and ", quantised)][: 1 + (training.device == "cuda")]:
        tokens = changed.batch_tokens // 2
        while tokens >= LEAST_TOKENS:
            fewer = replace(changed, batch_tokens=tokens, response_tokens=None)
            if sum(training_needs(shape, fewer).values()) <= left:
                return f"use {words}--batch-tokens {tokens}{lower}"
            tokens //= 2
    missing = _gib(plan.needed - plan.memory.free)
    return f"{missing} are missing: take a smaller model, a lower rank or a larger machine"


def checked(plan: Plan, shape: ModelShape, training: Training) -> Plan:
    """The plan, if it fits. Raises DoesNotFitError."""
    if not plan.fits:
        raise DoesNotFitError("\n".join([*plan.lines(), f"does_not_fit: {refusal(plan, shape, training)}"]))
    return plan


def resolved_device(wanted: str) -> Literal["cpu", "cuda"]:
    """`auto` as the training process will take it."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and gpu_memory() is not None) else "cpu"


def dtype_bytes(dtype: str, device: str) -> int:
    return 2 if dtype == "bfloat16" or (dtype == "auto" and device == "cuda") else 4


def memory_of(device: str) -> Memory | None:
    return gpu_memory() if device == "cuda" else host_memory()


def refuse_quantise(quantise: str, device: str) -> None:
    """4-bit weights are unpacked by CUDA kernels. Raises DoesNotFitError elsewhere."""
    if quantise == "4bit" and device != "cuda":
        raise DoesNotFitError("quantise 4bit needs an NVIDIA GPU (CUDA): none is used here, set it to none")


def check_worker(settings: WorkerSettings) -> None:
    """Before the training process starts: its plan against what is free now. Raises DoesNotFitError.

    Without a plan (an unknown kind of model, a system that does not tell its memory) the worker starts as it is.
    """
    device = resolved_device(settings.device)
    refuse_quantise(settings.quantise, device)
    if settings.preflight == "off":
        return
    memory = memory_of(device)
    try:
        shape = read_shape(settings.model)
    except (OSError, ValueError) as error:
        log.warning("no memory plan: %s", error)
        return
    if memory is None:
        log.warning("no memory plan: the system does not say how much there is")
        return
    training = Training(
        device, dtype_bytes(settings.dtype, device), settings.quantise, batch_tokens=settings.batch_tokens
    )
    needs = of_ranks(training_needs(shape, training), device, settings.ranks, settings.shard)
    plan = Plan(_place(device), memory, needs, {})
    log.info("%s", "; ".join(line.strip() for line in checked(plan, shape, training).lines()))


def of_ranks(needs: dict[str, int], device: str, ranks: int, shard: bool) -> dict[str, int]:
    """One process's needs as those of `ranks` of them in the same memory. Each GPU has one of them, and of a sharded
    base its part; in main memory each reads the base whole before it keeps a part."""
    if device == "cpu":
        return {what: size * ranks for what, size in needs.items()}
    return needs | ({"base": needs["base"] // ranks} if shard else {})


def _place(device: str) -> str:
    return "GPU" if device == "cuda" else "main memory"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="perennial preflight", description=__doc__)
    flags.add_argument("--model", type=Path, required=True, help="directory of the base model")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    flags.add_argument("--quantise", choices=("none", "4bit"), default="none", help="the trainer's base weights")
    flags.add_argument("--batch-tokens", type=int, default=8192, help="of one micro-batch, prompts included")
    flags.add_argument("--response-tokens", type=int, help="of one micro-batch; half of --batch-tokens by default")
    flags.add_argument("--max-lora-rank", type=int, default=64)
    flags.add_argument("--max-loras", type=int, default=8)
    flags.add_argument(
        "--max-model-len", type=int, help="longest sequence of the engine; the model's window by default"
    )
    flags.add_argument(
        "--gpu-memory-utilization", type=float, help="vLLM's share; without it the embedded engine is planned"
    )
    flags.add_argument("--trainer-only", action="store_true", help="the engine runs already, or elsewhere")
    return flags.parse_args(arguments)


def plan_of(options: argparse.Namespace, shape: ModelShape, memory: Memory) -> tuple[Plan, Training]:
    """Trainer and engine in one place."""
    device = resolved_device(options.device)
    width = dtype_bytes(options.dtype, device)
    training = Training(
        device, width, options.quantise, options.max_lora_rank,
        batch_tokens=options.batch_tokens, response_tokens=options.response_tokens,
    )  # fmt: skip
    share = options.gpu_memory_utilization
    length = min(options.max_model_len or shape.window, shape.window)
    serving = Serving(width, options.max_loras, options.max_lora_rank, length)
    if share is None:
        serving = replace(serving, max_loras=2, sequences=4, process_bytes=EMBEDDED_BYTES)
    plan = Plan(
        place=_place(device),
        memory=memory,
        trainer=training_needs(shape, training),
        engine={} if options.trainer_only else serving_needs(shape, serving),
        share=None if share is None or options.trainer_only else int(share * memory.total),
    )
    return plan, training


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        shape = read_shape(options.model)
    except (OSError, ValueError) as error:
        print(f"no plan: {error}", file=sys.stderr)
        return 2
    device = resolved_device(options.device)
    if (memory := memory_of(device)) is None:
        print(f"no plan: nothing says how much memory there is ({_place(device)})", file=sys.stderr)
        return 2
    plan, training = plan_of(options, shape, memory)
    try:
        refuse_quantise(options.quantise, device)
        checked(plan, shape, training)
    except DoesNotFitError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(plan.lines()))
    if plan.share is not None:
        cache = plan.share - sum(plan.engine.values()) + plan.engine["KV cache"]
        print(f"  {'KV cache in tokens':31} {cache // kv_bytes(shape, training.dtype_bytes):>12,}")
    print(f"It fits: {(plan.memory.free - plan.needed) / GIB:.1f} GiB are left.")
    return 0


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
