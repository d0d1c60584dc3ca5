"""How much memory training and serving need, as arithmetic over a model's shape. Imports no torch.

All sizes are bytes. Where a formula comes from, and what was measured, is said at each; docs/operations.md has the
table. Estimates are for one micro-batch at its largest and no gradient checkpointing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
Quantise = Literal["none", "4bit"]

MAX_HEADER = 100 * 2**20
NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256
"""Per weight: four bits, a scale of one byte for each 64, and a float32 for each 256 of those (double quantisation)."""
LORA_STATE_BYTES = 16
"""Per adapter weight, all float32: the weight, its gradient and AdamW's two moments."""
LOGIT_BYTES = {4: 36, 2: 33}
"""Of the plain path, per response token and vocabulary entry, by bytes of the model's dtype. Measured as peak resident
memory of `train_batch` (default options) for 32,768 and 65,536 entries: 9.0 float32 copies, in bfloat16 8.1."""
CHUNK_LOGITS, LEAST_CHUNK = 1 << 23, 16
"""Of the fast path: logits at a time, and response tokens at least (sdpo_core.fast.scores' numbers)."""
LOGIT_COPIES = 6
"""float32 tensors of a chunk's size at a time, at most: when a teacher with a tail bucket is scored."""
HELD_MORE = {"cpu": 2.2, "cuda": 1.15}
"""What the allocator holds over what is saved for the backward pass. cpu: measured with glibc, 2.1 in float32 and 1.7
in bfloat16 (1.0 when every block is unmapped at once). cuda: an allowance, not measured."""
PROCESS_BYTES = {"cpu": 600 * 2**20, "cuda": 1536 * 2**20}
"""Interpreter, libraries and their workspaces. cpu: 370 MB measured before the first batch. cuda: an allowance for
context and workspaces on the device."""
VLLM_BYTES = 3 * GIB
"""Allowance for vLLM's context, profiling peak and CUDA graphs."""


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: what its config.json and the headers of its weights say."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int
    parameters: int
    layer_matrices: int
    """Weights in the matrices of the layers: what 4-bit quantisation reaches."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_heads * self.head_dim

    def modules(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of the layers that an adapter may be on."""
        h, i, q, kv = self.hidden, self.intermediate, self.query, self.key_value
        return {
            "q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
            "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h),
        }  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How the worker trains."""

    device: Literal["cpu", "cuda"]
    dtype_bytes: int
    """Of base weights and activations: 4 for float32, 2 for bfloat16."""
    quantise: Quantise = "none"
    rank: int = 64
    """The largest that adapters may have."""
    modules: tuple[str, ...] | None = None
    """Adapted modules; None: all of them."""
    batch_tokens: int = 8192
    """Of one micro-batch, prompts and responses together. A single sample that is longer is not in the plan."""
    response_tokens: int | None = None
    """Of one micro-batch: those that logits are computed for; None: half of them."""
    path: Literal["plain", "fast"] = "fast"
    """Which of sdpo_core's computes the loss."""


@dataclass(frozen=True)
class Serving:
    """How vLLM, or the embedded engine, serves."""

    dtype_bytes: int
    max_loras: int = 8
    max_lora_rank: int = 64
    sequence_tokens: int = 8192
    """Longest sequence; the KV cache must hold one at least."""
    sequences: int = 1
    process_bytes: int = VLLM_BYTES


def read_shape(model: Path) -> ModelShape:
    """From local files. Raises OSError, and ValueError for a model that is no dense decoder of a known form."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    parameters, layer_matrices = _count_weights(model)
    try:
        return ModelShape(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            window=config["max_position_embeddings"],
            parameters=parameters,
            layer_matrices=layer_matrices,
        )
    except KeyError as error:
        raise ValueError(f"{model}/config.json has no {error}: no plan can be made for this kind of model") from error


def _count_weights(model: Path) -> tuple[int, int]:
    """Elements of all weights, and of the layers' matrices, by the headers of the safetensors files."""
    total = matrices = 0
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model} holds no safetensors file")
    for file in files:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"{file} has a header of {length} bytes")
            header: dict[str, Any] = json.loads(handle.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            size = 1
            for extent in tensor["shape"]:
                size *= extent
            total += size
            if ".layers." in name and len(tensor["shape"]) == 2:
                matrices += size
    return total, matrices


def adapter_weights(shape: ModelShape, rank: int, modules: tuple[str, ...] | None = None) -> int:
    """Weights of one adapter: rank x (in + out) for each module of each layer."""
    known = shape.modules()
    return shape.layers * rank * sum(sum(known[m]) for m in modules or tuple(known) if m in known)


def activation_bytes(shape: ModelShape, dtype_bytes: int, rank: int, adapted: int) -> int:
    """Per token and layer, saved for the backward pass of a frozen base with LoRA on `adapted` modules.

    Counted with autograd's hooks on Qwen3 under Transformers 5.23 and PEFT 0.21 (norms and adapters work in float32);
    the same for every length, since attention saves no matrix of scores.
    """
    h, i, q, kv = shape.hidden, shape.intermediate, shape.query, shape.key_value
    dense = 16 * h + 16 * i + 12 * q + 13 * kv if dtype_bytes == 4 else 28 * h + 10 * i + 12 * q + 9 * kv
    return dense + 4 * adapted * rank + 10 * shape.heads + 8


def base_bytes(shape: ModelShape, dtype_bytes: int, quantise: Quantise) -> int:
    if quantise == "none":
        return shape.parameters * dtype_bytes
    return int(shape.layer_matrices * NF4_BYTES) + (shape.parameters - shape.layer_matrices) * dtype_bytes


def plain_logit_bytes(shape: ModelShape, responses: int, dtype_bytes: int) -> int:
    """Everything as wide as the vocabulary on the plain path, of a micro-batch with so many response tokens."""
    return responses * shape.vocabulary * LOGIT_BYTES[dtype_bytes]


def chunk_bytes(shape: ModelShape) -> int:
    """The logits of one chunk on the fast path, whatever the batch."""
    return max(LEAST_CHUNK * shape.vocabulary, CHUNK_LOGITS) * 4 * LOGIT_COPIES


def training_needs(shape: ModelShape, t: Training) -> dict[str, int]:
    """Bytes by purpose, on the device that trains. Writing answers comes before the activations and needs less: of
    every layer the keys and values of as many tokens, which `activation_bytes` holds and more besides."""
    responses = t.batch_tokens // 2 if t.response_tokens is None else min(t.response_tokens, t.batch_tokens)
    adapted = len(t.modules or shape.modules())
    saved = t.batch_tokens * shape.layers * activation_bytes(shape, t.dtype_bytes, t.rank, adapted)
    needs = {
        "process": PROCESS_BYTES[t.device],
        "base": base_bytes(shape, t.dtype_bytes, t.quantise),
        "adapter and optimizer": LORA_STATE_BYTES * adapter_weights(shape, t.rank, t.modules),
        "activations": int(saved * HELD_MORE[t.device]),
        "logits": chunk_bytes(shape) if t.path == "fast" else plain_logit_bytes(shape, responses, t.dtype_bytes),
    }
    if t.quantise == "4bit":  # one matrix at a time is unpacked
        needs["unpacking"] = max(a * b for a, b in shape.modules().values()) * t.dtype_bytes
    return needs


def kv_bytes(shape: ModelShape, dtype_bytes: int) -> int:
    """Per token of the KV cache: keys and values of every layer."""
    return 2 * shape.layers * shape.key_value * dtype_bytes


def serving_needs(shape: ModelShape, s: Serving) -> dict[str, int]:
    """Bytes by purpose, at least."""
    return {
        "process": s.process_bytes,
        "base": shape.parameters * s.dtype_bytes,
        "adapters": s.max_loras * adapter_weights(shape, s.max_lora_rank) * s.dtype_bytes,
        "KV cache": s.sequences * s.sequence_tokens * kv_bytes(shape, s.dtype_bytes),
    }
