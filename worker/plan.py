"""How much of a batch to compute at a time: chosen for each job from the memory that is free, the model and the batch.

Arithmetic over worker.memory's formulas for the path that will run: hidden states of every layer, and the logits of one
chunk on the fast path, of a micro-batch on the plain one.
What it gets wrong is made good by sdpo_core.path_choice, which goes on with less when memory does run out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from sdpo_core.options import Options
from sdpo_core.samples import Sample
from worker.base_model import BaseModel
from worker.machine import host_memory
from worker.memory import (
    HELD_MORE,
    LORA_STATE_BYTES,
    ModelShape,
    activation_bytes,
    adapter_weights,
    chunk_bytes,
    kv_bytes,
    plain_logit_bytes,
)

RESERVE = 0.1
"""Share of the free memory that no plan counts on."""
LEAST_TOKENS = 256


def planned(options: Options, base: BaseModel, samples: Sequence[Sample], rank: int) -> Options:
    """The options with the largest micro-batches that fit, with checkpointing only where nothing else does."""
    options = options.replace(micro_batch_tokens=base.batch_tokens, compile_layers=base.compile_layers)
    free = free_bytes(base.device)
    live = [s for s in samples if s.live]
    lengths = [s.student_length for s in live]
    if base.shape is None or free is None or not lengths:
        return options
    plain = options.path == "plain" or bool(base.fast_obstacle)
    share = max(len(s.response_ids) / s.student_length for s in live) if plain else None
    sharers = base.ranks.size if base.device.type == "cpu" else 1  # ranks on CPUs share the memory
    room = int(free * (1 - RESERVE)) // sharers
    return fitting(options, base.shape, lengths, rank, room, base.device.type, _width(base), share)


def fitting(
    options: Options, shape: ModelShape, lengths: Sequence[int], rank: int, free: int, device: str, width: int,
    plain_share: float | None = None,
) -> Options:  # fmt: skip
    """The first of `candidates` that needs `free` bytes or fewer; the last one where none does.

    `plain_share`: on the plain path, the largest share of a sample that is response; None: the fast path.
    """
    chosen = options
    for chosen in candidates(options, lengths, may_checkpoint=plain_share is None):
        tokens = max(min(chosen.micro_batch_tokens, sum(lengths)), *lengths)
        responses = None if plain_share is None else math.ceil(tokens * plain_share)
        size = needed(shape, tokens, rank, device, width, checkpointing=chosen.checkpointing, plain_responses=responses)
        if size <= free:
            break
    return chosen


def candidates(options: Options, lengths: Sequence[int], *, may_checkpoint: bool = True) -> Iterator[Options]:
    """Halved micro-batches down to the longest sample, then the same with checkpointing where that can be."""
    for checkpointing in (False, True) if may_checkpoint else (False,):
        yield options.replace(checkpointing=checkpointing)
        tokens = min(options.micro_batch_tokens, sum(lengths))
        while tokens > max(*lengths, LEAST_TOKENS):
            tokens //= 2
            yield options.replace(micro_batch_tokens=tokens, checkpointing=checkpointing)


def needed(
    shape: ModelShape, tokens: int, rank: int, device: str, width: int, *, checkpointing: bool,
    plain_responses: int | None = None,
) -> int:  # fmt: skip
    """Bytes of one micro-batch on top of the resident base; `width`: bytes of a base weight. `plain_responses`:
    response tokens of the micro-batch on the plain path; None: the fast path.

    Answers that the teacher writes are decoded as many tokens at a time, before anything is kept for a backward pass:
    what their keys and values take counts where it is more.
    """
    layer = activation_bytes(shape, width, rank, len(shape.modules()))
    kept = shape.hidden * width * shape.layers + layer if checkpointing else layer * shape.layers
    kept = max(kept, kv_bytes(shape, width))
    logits = chunk_bytes(shape)
    if plain_responses is not None:
        logits = plain_logit_bytes(shape, plain_responses, 4 if width == 4 else 2)
    states = LORA_STATE_BYTES * adapter_weights(shape, rank)
    return int(tokens * kept * HELD_MORE[device]) + logits + states


def free_bytes(device: torch.device) -> int | None:
    """Memory that training may take now; None where the system does not say. On a GPU, what torch holds and does not
    use counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    memory = host_memory()
    return None if memory is None else memory.free


def _width(base: BaseModel) -> int:
    return next(base.module.parameters()).element_size()
