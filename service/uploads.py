"""Adapters from elsewhere: two raw files, each staged under its own SHA-256, then made into a version directory.

Nothing of theirs is unpacked, and no library reads them before our own checks have. Of their config only the fields we
know are looked at; the one that engines read is ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import anyio

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry
from service import admission
from service.errors import BadRequest, NotFound, TooLarge, TooMany, VersionRejected
from service.storage.base import UPLOADS, Storage

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STALE_SECONDS = 3600.0
MAX_STAGED = 6
"""Files of one adapter that may wait for their commit at once."""
CHUNK_SECONDS = 60.0
"""A client that sends nothing for so long is given up."""


@dataclass(frozen=True)
class Wanted:
    """What an upload must be: the adapter's own shape on the service's base."""

    base_model: str
    base_shapes: Mapping[str, admission.Shape]
    lora: LoraSettings

    def limit(self, name: str) -> int:
        return admission.MAX_CONFIG if name == CONFIG else admission.largest_weights(self.base_shapes, self.lora)

    def check(self, name: str, path: Path) -> None:
        """Raises VersionRejected."""
        if name == CONFIG:
            admission.check_config(path, self.base_model, self.lora)
        else:
            admission.check_weights(path, self.base_shapes, self.lora)


def staging_of(adapter: Path) -> Path:
    return adapter / UPLOADS


async def receive(
    chunks: AsyncIterator[bytes], adapter: Path, name: str, wanted: Wanted, *, patience: float = CHUNK_SECONDS
) -> FileEntry:
    """Stream one file to disk, and check it.

    Keeps nothing when it raises VersionRejected, TooLarge, TooMany or BadRequest.
    """
    part = await anyio.to_thread.run_sync(_new_part, staging_of(adapter))
    try:
        size, sha256 = await _write(_patient(chunks, patience), part, name, wanted)
        await anyio.to_thread.run_sync(wanted.check, name, part)
        await anyio.to_thread.run_sync(os.replace, part, part.with_name(sha256))
    finally:
        part.unlink(missing_ok=True)
    return FileEntry(name=f"adapter/{name}", size=size, sha256=sha256)


@asynccontextmanager
async def landed(
    chunks: AsyncIterator[bytes], directory: Path, sha256: str, *, patience: float = CHUNK_SECONDS
) -> AsyncIterator[Path]:
    """A worker's file on disk, of these very bytes, for as long as the block runs. Raises BadRequest."""
    path = directory / f".part-{secrets.token_hex(8)}"
    await anyio.to_thread.run_sync(partial(directory.mkdir, parents=True, exist_ok=True))
    try:
        digest = hashlib.sha256()
        with path.open("wb") as file:
            async for chunk in _patient(chunks, patience):
                digest.update(chunk)
                await anyio.to_thread.run_sync(file.write, chunk)
        if digest.hexdigest() != sha256:
            raise BadRequest("The file has changed on its way; send it again.", code="wrong_checksum")
        yield path
    finally:
        path.unlink(missing_ok=True)


def _new_part(staging: Path) -> Path:
    staging.mkdir(parents=True, exist_ok=True)
    if sum(1 for _ in staging.iterdir()) >= MAX_STAGED:
        raise TooMany("Too many uploads of this adapter wait for their commit.", retry_after=60)
    part = staging / f".part-{secrets.token_hex(8)}"
    part.touch()
    return part


async def _write(chunks: AsyncIterator[bytes], part: Path, name: str, wanted: Wanted) -> tuple[int, str]:
    """Size and SHA-256. The header of a weights file is judged as soon as it is there, before the rest is taken."""
    digest, size, head = hashlib.sha256(), 0, _Head(wanted) if name == WEIGHTS else None
    with part.open("wb") as file:
        async for chunk in chunks:
            size += len(chunk)
            if size > wanted.limit(name):
                raise TooLarge(f"{name} of this adapter has at most {wanted.limit(name)} bytes.")
            if head is not None and head.add(chunk):
                head = None
            digest.update(chunk)
            await anyio.to_thread.run_sync(file.write, chunk)
        await anyio.to_thread.run_sync(_settle, file)
    return size, digest.hexdigest()


async def _patient(chunks: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise BadRequest("The upload has stalled; send it again.", code="upload_stalled") from error
        if chunk is None:
            return
        yield chunk


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Head:
    """The first bytes of a weights file as they come."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._bytes = bytearray()

    def add(self, chunk: bytes) -> bool:
        """True once the whole header was read and is good. Raises VersionRejected as soon as it cannot be."""
        self._bytes += chunk[: 8 + admission.MAX_HEADER + admission.HEADER_START - len(self._bytes)]
        if len(self._bytes) < admission.HEADER_START:
            return False  # a file as short as that is judged when it is whole
        end = 8 + admission.header_length(bytes(self._bytes[: admission.HEADER_START]))
        if len(self._bytes) < end:
            return False
        entries = admission.parse_header(bytes(self._bytes[8:end]))
        wanted = admission.expected_tensors(self._wanted.base_shapes, self._wanted.lora)
        admission.check_layout(entries, wanted)
        return True


def staged(adapter: Path, name: str, sha256: str, storage: Storage) -> Path:
    """Raises NotFound unless a file of these bytes was uploaded, here or through another host, and is still there."""
    path = staging_of(adapter) / sha256
    if not path.is_file():
        storage.fetch_staged(adapter.name, sha256, path)
    if not path.is_file():
        raise NotFound(f"No {name} of this SHA-256 was uploaded in the last hour.", code="upload_not_found", param=name)
    return path


def assemble(final: Path, config: Path, weights: Path, wanted: Wanted, about: dict[str, Any]) -> list[FileEntry]:
    """The version directory `final`, durable and whole or not there. Checked once more as what it is.

    Raises VersionRejected.
    """
    wanted.check(CONFIG, config)
    adapter = final.parent
    making = adapter / f".upload-{final.name}"
    try:
        (making / "adapter").mkdir(parents=True)
        shutil.copyfile(weights, making / "adapter" / WEIGHTS)
        for name, text in _texts(wanted, about).items():
            (making / "adapter" / name).write_text(text, encoding="utf-8")
        admission.check_adapter(making / "adapter", wanted.base_shapes, wanted.base_model, wanted.lora)
        files = [_entry(path) for path in sorted((making / "adapter").iterdir())]
        if not any(f.sha256 == weights.name for f in files):
            raise VersionRejected("wrong_checksum: the uploaded weights have changed on our disk; send them again.")
        for path in (*(making / f.name for f in files), making / "adapter", making):
            _sync(path)
        making.rename(final)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    for path in (adapter, adapter.parent):
        _sync(path)
    return files


def _texts(wanted: Wanted, about: dict[str, Any]) -> dict[str, str]:
    """The files that are ours: PEFT's config, a card, and where the version came from."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": wanted.base_model,
        "r": wanted.lora.rank, "lora_alpha": wanted.lora.alpha, "lora_dropout": 0.0,
        "target_modules": sorted(wanted.lora.target_modules), "bias": "none", "inference_mode": True,
    }  # fmt: skip
    card = (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(wanted.base_model)}\npipeline_tag: text-generation\n"
        f"tags:\n- lora\n---\n\n# {about['adapter']}\n\nA LoRA adapter (rank {wanted.lora.rank}, alpha "
        f"{wanted.lora.alpha}) for `{wanted.base_model}` that was uploaded to Perennial.\n"
    )
    provenance = {"format": 1, "source": "upload", **about, "lora": wanted.lora.model_dump()}
    return {
        CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n",
        "README.md": card,
        "perennial.json": json.dumps(provenance, indent=2) + "\n",
    }


def _entry(path: Path) -> FileEntry:
    return FileEntry(name=f"adapter/{path.name}", size=path.stat().st_size, sha256=admission.sha256_of(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_stale(root: Path, older_than: float = STALE_SECONDS) -> None:
    """Remove uploads that were not committed in time, and what a killed commit left."""
    before = time.time() - older_than
    left = ("adp_*/.uploads/*", "adp_*/.uploads/.part-*", "adp_*/.upload-*", "incoming/.part-*")
    for path in (found for pattern in left for found in root.glob(pattern)):
        try:
            if path.stat().st_mtime < before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # committed or purged meanwhile
            continue
