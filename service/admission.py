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
MAX_NORM = 1000.0
"""Of alpha / rank * |A| * |B| (Frobenius) of one layer. Finite weights that are huge overflow to NaN in the engine;
trained adapters stay below 100."""
HEADER_START = 512
"""So many bytes tell a safetensors file from other kinds."""
OTHER_KINDS = {
    "archive: a zip file": (0, b"PK\x03\x04"),
    "archive: a gzip file": (0, b"\x1f\x8b\x08"),
    "archive: a bzip2 file": (0, b"BZh"),
    "archive: a xz file": (0, b"\xfd7zXZ\x00"),
    "archive: a zstd file": (0, b"\x28\xb5\x2f\xfd"),
    "archive: a 7z file": (0, b"7z\xbc\xaf\x27\x1c"),
    "archive: a tar file": (257, b"ustar"),
    "pickle: protocol 2": (0, b"\x80\x02"),
    "pickle: protocol 3": (0, b"\x80\x03"),
    "pickle: protocol 4": (0, b"\x80\x04"),
    "pickle: protocol 5": (0, b"\x80\x05"),
}
"""Reason -> (offset, first bytes), looked at only once a file is known not to be safetensors."""
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
        first = file.read(HEADER_START)
        length = header_length(first, limit=limit)
        if 8 + length > size:
            raise VersionRejected("bad_file: not a whole safetensors file.")
        file.seek(8)
        entries = parse_header(file.read(length))
    if max((e.end for e in entries.values()), default=8 + length) != size:
        raise VersionRejected("bad_file: truncated, or bytes after the last tensor.")
    return entries


def header_length(first: bytes, *, limit: int = MAX_HEADER) -> int:
    """Bytes of the header, from the first HEADER_START bytes of a file (or all, if it has fewer).

    Raises VersionRejected when it would be longer than `limit`; what is plainly something else is named.
    """
    length = int.from_bytes(first[:8], "little")
    if len(first) >= 8 and length <= limit:
        return length
    for kind, (at, magic) in OTHER_KINDS.items():
        if first[at:].startswith(magic):
            raise VersionRejected(f"{kind}; upload the safetensors file itself.")
    raise VersionRejected("bad_file: not a whole safetensors file, or a header of more than 1 MiB.")


def parse_header(raw: bytes) -> dict[str, TensorEntry]:
    """The tensors that a header names, which lie one after the other. Raises VersionRejected."""
    try:
        header = json.loads(raw)
        entries = {k: _entry(v, 8 + len(raw)) for k, v in header.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VersionRejected("bad_file: the safetensors header cannot be read.") from error
    at = 8 + len(raw)
    for entry in sorted(entries.values(), key=lambda e: e.begin):
        if entry.begin != at:
            raise VersionRejected("bad_file: tensors overlap or leave a hole.")
        at = entry.end
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
    check_weights(weights, base, lora)


def check_weights(path: Path, base: Mapping[str, Shape], lora: LoraSettings) -> None:
    """Raises VersionRejected unless the file holds exactly the tensors of this shape, finite and not huge."""
    found = read_header(path)
    check_layout(found, expected_tensors(base, lora))
    norms = {name: _norm(path, entry) for name, entry in found.items()}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise VersionRejected(f"not_finite: {name} holds NaN or Inf.")
        if ".lora_A." in name:
            size = lora.alpha / lora.rank * norm * norms[name.replace(".lora_A.", ".lora_B.")]
            if size > MAX_NORM:
                raise VersionRejected(f"too_large: the update of {name} has norm {size:.3g}; {MAX_NORM:g} is allowed.")


def largest_weights(base: Mapping[str, Shape], lora: LoraSettings) -> int:
    """Most bytes that a weights file of this shape can have."""
    return 8 + MAX_HEADER + 4 * sum(math.prod(s) for s in expected_tensors(base, lora).values())


def check_layout(found: Mapping[str, TensorEntry], wanted: Mapping[str, Shape]) -> None:
    """Raises VersionRejected unless a header names exactly these tensors, in a type and shape that is taken."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise VersionRejected(f"missing_keys: {len(missing)} tensors, the first is {missing[0]}.")
    if extra := sorted(found.keys() - wanted.keys()):
        raise VersionRejected(f"extra_keys: {len(extra)} tensors, the first is {extra[0][:200]!a}.")
    for name, entry in found.items():
        if entry.dtype not in DTYPES:
            raise VersionRejected(f"wrong_dtype: {name} is {entry.dtype[:20]!a}; F32, F16 or BF16 is taken.")
        if entry.shape != wanted[name]:
            raise VersionRejected(f"wrong_shape: {name} is {entry.shape}, this base and rank need {wanted[name]}.")


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


def _norm(path: Path, entry: TensorEntry) -> float:
    """Frobenius norm; NaN or Inf when a number is. Read in pieces: memory stays small however large the file is."""
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.dtype]
    total = 0.0
    with path.open("rb") as file:
        file.seek(entry.begin)
        for at in range(entry.begin, entry.end, CHUNK):
            numbers = np.frombuffer(file.read(min(CHUNK, entry.end - at)), kind)
            if entry.dtype == "BF16":  # the upper half of a float32
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            total += float(np.square(numbers.astype(np.float64)).sum())
    return math.sqrt(total)


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
