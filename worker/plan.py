"""How much of a batch to compute at a time: chosen for each job from the memory that is free, the model and the batch.

Arithmetic over worker.memory's formulas, for the fast path: hidden states of every layer, and the logits of one chunk.
What it gets wrong is made good by sdpo_core.path_choice, which goes on with less when memory does run out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sdpo_core.fast.head import chunk_tokens
from sdpo_core.options import Options
from sdpo_core.samples import Sample
from worker.base_model import BaseModel
from worker.machine import host_memory
from worker.memory import HELD_MORE, LORA_STATE_BYTES, ModelShape, activation_bytes, adapter_weights, kv_bytes

LOGIT_COPIES = 6
"""float32 tensors of a chunk's size at a time, at most: when a teacher with a tail bucket is scored."""
RESERVE = 0.1
"""Share of the free memory that no plan counts on."""
LEAST_TOKENS = 256


def planned(options: Options, base: BaseModel, samples: Sequence[Sample], rank: int) -> Options:
    """The options with the largest micro-batches that fit, with checkpointing only where nothing else does."""
    options = options.replace(micro_batch_tokens=base.batch_tokens)
    free = free_bytes(base.device)
    lengths = [s.student_length for s in samples if s.live]
    if base.shape is None or free is None or not lengths:
        return options
    return fitting(options, base.shape, lengths, rank, int(free * (1 - RESERVE)), base.device.type, _width(base))


def fitting(
    options: Options, shape: ModelShape, lengths: Sequence[int], rank: int, free: int, device: str, width: int
) -> Options:
    """The first of `candidates` that needs `free` bytes or fewer; the last one where none does."""
    chosen = options
    for chosen in candidates(options, lengths):
        tokens = min(chosen.micro_batch_tokens, sum(lengths))
        if needed(shape, max(tokens, max(lengths)), rank, device, width, checkpointing=chosen.checkpointing) <= free:
            break
    return chosen


def candidates(options: Options, lengths: Sequence[int]) -> Iterator[Options]:
    """Halved micro-batches down to the longest sample, then the same with checkpointing."""
    for checkpointing in (False, True):
        yield options.replace(checkpointing=checkpointing)
        tokens = min(options.micro_batch_tokens, sum(lengths))
        while tokens > max(*lengths, LEAST_TOKENS):
            tokens //= 2
            yield options.replace(micro_batch_tokens=tokens, checkpointing=checkpointing)


def needed(shape: ModelShape, tokens: int, rank: int, device: str, width: int, *, checkpointing: bool) -> int:
    """Bytes of one micro-batch on top of the resident base; `width`: bytes of a base weight.

    Answers that the teacher writes are decoded as many tokens at a time, before anything is kept for a backward pass:
    what their keys and values take counts where it is more.
    """
    layer = activation_bytes(shape, width, rank, len(shape.modules()))
    kept = shape.hidden * width * shape.layers + layer if checkpointing else layer * shape.layers
    kept = max(kept, kv_bytes(shape, width))
    logits = chunk_tokens(shape.vocabulary) * shape.vocabulary * 4 * LOGIT_COPIES
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
