"""Admission: what a version's files must be before any engine sees them.

vLLM validates almost nothing: a NaN weight, a wrong base or extra layers load with 200 and hurt other tenants. So the
files are parsed here, header first, by our own few lines and without any library that could run code.
Reasons of refusal are stable words at the start of the message.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry
from service.errors import VersionRejected

MAX_HEADER = 2**20
MAX_CONFIG = 64 * 2**10
CHUNK = 2**20
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
EMBEDDINGS = ("embed_tokens", "embeddings", ".wte", ".wpe")
"""Tables, not linear layers: PEFT adapts them in another way, which is not served."""
ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md", "perennial.json"})
"""All that `adapter/` may hold: engines also read tokenizers and pickles that lie beside the weights."""
UNSUPPORTED = (
    "use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern",
    "auto_mapping", "auto_map", "layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Options of PEFT that change what the weights mean; the shape of ours is plain LoRA."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    dtype: str
    shape: Shape
    begin: int
    """Byte offset in the file."""
    end: int


def read_header(path: Path, *, limit: int = MAX_HEADER) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file. Raises VersionRejected unless they cover the file exactly, without overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(limit, size - 8):
            raise VersionRejected("bad_file: not a whole safetensors file.")
        try:
            header = json.loads(file.read(length))
            entries = {k: _entry(v, 8 + length) for k, v in header.items() if k != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise VersionRejected("bad_file: the safetensors header cannot be read.") from error
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda e: e.begin):
        if entry.begin != at:
            raise VersionRejected("bad_file: tensors overlap or leave a hole.")
        at = entry.end
    if at != size:
        raise VersionRejected("bad_file: truncated, or bytes after the last tensor.")
    return entries


def _entry(value: Mapping[str, Any], start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape = tuple(int(d) for d in value["shape"])
    dtype = str(value["dtype"])
    width = DTYPES.get(dtype)
    if width is not None and (min(shape, default=0) < 0 or end - begin != width * math.prod(shape)):
        raise ValueError("offsets do not match the shape")
    return TensorEntry(dtype, shape, start + int(begin), start + int(end))


def linear_shapes(model_dir: Path) -> dict[str, Shape]:
    """(out, in) of every 2-D weight of the base model by module name, from its files' headers alone.

    Raises FileNotFoundError when there are no safetensors files.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors files in {model_dir}")
    shapes: dict[str, Shape] = {}
    for path in files:
        for name, entry in read_header(path, limit=100 * 2**20).items():
            if len(entry.shape) == 2 and not name.removesuffix(".weight").endswith(EMBEDDINGS):
                shapes[name.removesuffix(".weight")] = entry.shape
    return shapes


def expected_tensors(base: Mapping[str, Shape], lora: LoraSettings) -> dict[str, Shape]:
    """Key and shape of every tensor that an adapter of this shape must have, in PEFT's names."""
    tensors: dict[str, Shape] = {}
    for module, (out, into) in ((m, s) for m, s in base.items() if m.rsplit(".", 1)[-1] in lora.target_modules):
        tensors[f"base_model.model.{module}.lora_A.weight"] = (lora.rank, into)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (out, lora.rank)
    return tensors


def check_adapter(directory: Path, base: Mapping[str, Shape], base_model: str, lora: LoraSettings) -> None:
    """Raises VersionRejected with the reason unless this PEFT directory fits the base and holds finite numbers only."""
    check_config(directory / "adapter_config.json", base_model, lora)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() or weights.is_symlink():
        raise VersionRejected("missing_file: adapter_model.safetensors.")
    found, wanted = read_header(weights), expected_tensors(base, lora)
    if missing := sorted(wanted.keys() - found.keys()):
        raise VersionRejected(f"missing_keys: {len(missing)} tensors, the first is {missing[0]}.")
    if extra := sorted(found.keys() - wanted.keys()):
        raise VersionRejected(f"extra_keys: {len(extra)} tensors, the first is {extra[0][:200]!a}.")
    for name, entry in found.items():
        if entry.dtype not in DTYPES:
            raise VersionRejected(f"wrong_dtype: {name} is {entry.dtype[:20]!a}; F32, F16 or BF16 is taken.")
        if entry.shape != wanted[name]:
            raise VersionRejected(f"wrong_shape: {name} is {entry.shape}, this base and rank need {wanted[name]}.")
        if not _finite(weights, entry):
            raise VersionRejected(f"not_finite: {name} holds NaN or Inf.")


def check_config(path: Path, base_model: str, lora: LoraSettings) -> None:
    """Raises VersionRejected unless the PEFT config is a plain LoRA of this base and shape."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_CONFIG:
        raise VersionRejected("missing_file: adapter_config.json.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise VersionRejected("bad_config: adapter_config.json is not JSON.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise VersionRejected("bad_config: peft_type is not LORA.")
    if config.get("base_model_name_or_path") != base_model:
        raise VersionRejected("wrong_base: the config names another base model.")
    if config.get("r") != lora.rank or config.get("lora_alpha") != lora.alpha:
        raise VersionRejected("wrong_rank: r or lora_alpha is not the adapter's.")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or sorted(map(str, targets)) != sorted(lora.target_modules):
        raise VersionRejected("wrong_modules: target_modules are not the adapter's.")
    if config.get("bias", "none") != "none":
        raise VersionRejected("unsupported: bias.")
    for feature in UNSUPPORTED:
        if config.get(feature):
            raise VersionRejected(f"unsupported: {feature}.")


def _finite(path: Path, entry: TensorEntry) -> bool:
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.dtype]
    values = np.memmap(path, dtype=np.uint8, mode="r", offset=entry.begin, shape=(entry.end - entry.begin,))
    if not len(values):
        return True
    numbers = values.view(kind)
    if entry.dtype == "BF16":  # all exponent bits set: Inf or NaN
        return not bool(((numbers & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(numbers).all())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def version_digest(files: Iterable[FileEntry]) -> str:
    """`sha256:` over the lines `<name> <size> <sha256>`, sorted by name."""
    lines = "".join(f"{f.name} {f.size} {f.sha256}\n" for f in sorted(files, key=lambda f: f.name))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def check_files(directory: Path, files: Iterable[FileEntry]) -> None:
    """Raises VersionRejected unless the directory holds exactly these plain files with these sizes and checksums."""
    listed = list(files)
    named = {f.name: f for f in listed}
    if len(named) != len(listed):
        raise VersionRejected("wrong_files: the manifest names a file twice.")
    if foreign := sorted(n for n in named if n.startswith("adapter/") and n[len("adapter/") :] not in ADAPTER_FILES):
        raise VersionRejected(f"wrong_files: {foreign[0]} does not belong into an adapter.")
    if directory.is_symlink() or directory.parent.is_symlink():
        raise VersionRejected("wrong_files: the version's directory is a link.")
    on_disk = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    if on_disk != named.keys():
        odd = sorted(on_disk ^ named.keys())
        raise VersionRejected(f"wrong_files: {odd[0][:200]!a} is missing or not in the manifest.")
    for name, entry in named.items():
        path = directory / name
        plain = path.is_file() and not path.is_symlink()
        if not plain or path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise VersionRejected(f"wrong_checksum: {name} is not what the manifest says.")
