"""PEFT directories and base models of a few hundred weights, written with numpy alone; every fault on purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry, Lease

BASE = "tiny/base"
HIDDEN, KEYS, INNER = 8, 4, 6
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""(out, in) of the linear weights of the one layer."""

Arrays = dict[str, np.ndarray]
NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int64": "I64"}
"""numpy has no bfloat16: uint16 stands for its bits."""


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file: length of the header, header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def base_model(directory: Path) -> Path:
    """The weights of a base model; all that the service reads of one."""
    directory.mkdir(parents=True)
    weights = {f"model.layers.0.{m}.weight": np.zeros(s, np.float32) for m, s in MODULES.items()}
    weights |= {"model.embed_tokens.weight": np.zeros((16, HIDDEN), np.float32)}
    weights |= {"model.norm.weight": np.ones(HIDDEN, np.float32)}
    (directory / "model.safetensors").write_bytes(encode(weights))
    return directory


def tensors(lora: LoraSettings, value: float = 0.5) -> Arrays:
    """What an adapter of this shape must hold, every weight `value`."""
    made: Arrays = {}
    for module, (out, into) in MODULES.items():
        if module.rsplit(".", 1)[-1] in lora.target_modules:
            name = f"base_model.model.model.layers.0.{module}"
            made[f"{name}.lora_A.weight"] = np.full((lora.rank, into), value, np.float32)
            made[f"{name}.lora_B.weight"] = np.full((out, lora.rank), value, np.float32)
    return made


def config(lora: LoraSettings, **changes: Any) -> dict[str, Any]:
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "use_dora": False,
        "init_lora_weights": True,
    }
    return plain | changes


def write_version(root: Path, lease: Lease, *, value: float = 0.5) -> Path:
    """A valid version at the place of this lease's run."""
    directory = root / lease.adapter_id / lease.run_id
    for part in ("adapter", "trainer"):
        (directory / part).mkdir(parents=True)
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config(lease.lora)))
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(encode(tensors(lease.lora, value)))
    (directory / "adapter" / "README.md").write_text("# A test adapter\n")
    (directory / "trainer" / "optimizer.safetensors").write_bytes(encode({"m": np.zeros(3, np.float32)}))
    (directory / "trainer" / "state.json").write_text(json.dumps({"run": lease.run_id}))
    return directory


def manifest(directory: Path) -> list[FileEntry]:
    """Every file with its size and checksum."""
    return [
        FileEntry(
            name=path.relative_to(directory).as_posix(),
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
