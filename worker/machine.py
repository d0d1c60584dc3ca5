"""How much memory is there, asked of the system. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one place."""

    total: int
    free: int


def gpu_memory(command: Sequence[str] = ("nvidia-smi",)) -> Memory | None:
    """Of the first visible NVIDIA GPU; None where there is none."""
    query = [*command, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible:
        query.append(f"--id={visible}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        total, free = (int(part) * MIB for part in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Memory(total, free)


def host_memory(root: Path = Path("/")) -> Memory | None:
    """Of this machine, or of this container where that is less; None where the system does not say (not Linux)."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        entries = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        machine = Memory(entries["MemTotal"], entries["MemAvailable"])
    except (OSError, KeyError, ValueError):
        return None
    limit = _cgroup_limit(root)
    if limit is None or limit.total >= machine.total:
        return machine
    return Memory(limit.total, min(limit.free, machine.free))


def _cgroup_limit(root: Path) -> Memory | None:
    """Version 2; `max` means none. Cache that can be given back counts as free."""
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return Memory(limit, limit - used + int(stat.get("inactive_file", 0)))
