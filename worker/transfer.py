"""Versions over HTTP, for a worker that shares no directory with the service: the parent's files in, its own out.

`adapters_root` is then this host's cache. Every run that was written or fetched here has a marker
`<adapter>/.own-<run>` beside its directory: it says that the run may be removed again, and when it was last used.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from api_schemas.worker import FileEntry, Lease
from worker.service_client import ServiceClient
from worker.versions import PARTS, directory_of, scan, version_digest

OWN = ".own-"
_FETCHING = re.compile(r"\.fetch-[0-9a-f]{16}")
Alive = Callable[[], None]
"""Called when something has moved: the run is not stuck."""


async def fetch_parent(client: ServiceClient, lease: Lease, root: Path, alive: Alive) -> None:
    """Have the parent's directory here, whole and right. Raises as ServiceClient, and OSError.

    What is here already is kept if every byte is right; the rest comes anew.
    """
    if lease.parent is None:
        return
    directory = directory_of(root, lease.parent.uri)
    _mark(directory)
    if await asyncio.to_thread(_digest, directory) == lease.parent.digest:
        return
    making = directory.with_name(f".fetch-{secrets.token_hex(8)}")
    try:
        for part in PARTS:
            (making / part).mkdir(parents=True)
        for entry in lease.parent.files:
            await client.fetch_file(lease, entry, making / entry.name, alive)
        if not any(entry.name.startswith("trainer/") for entry in lease.parent.files):
            (making / "trainer").rmdir()  # as of an upload
        await asyncio.to_thread(_replace, making, directory)
    finally:
        await asyncio.to_thread(shutil.rmtree, making, ignore_errors=True)


def _digest(directory: Path) -> str | None:
    try:
        return version_digest(scan(directory))
    except (OSError, ValueError):
        return None


def _replace(made: Path, directory: Path) -> None:
    """No sync: each byte is checked again before it is used."""
    shutil.rmtree(directory, ignore_errors=True)
    made.rename(directory)


async def send(client: ServiceClient, lease: Lease, entry: FileEntry, root: Path, alive: Alive) -> None:
    """One file of the finished version. Safe to repeat. Raises as ServiceClient, and OSError."""
    directory = directory_of(root, f"{lease.adapter_id}/{lease.run_id}")
    await client.send_file(lease, entry, directory / entry.name, alive)


def begin(root: Path, lease: Lease, most_bytes: int, beside: Sequence[Lease] = ()) -> None:
    """Mark what this run will write, and make room: of what was here before, the longest unused goes first until the
    rest fits. The parent stays, and so does what the leases `beside` it need.

    Raises OSError, and ValueError for ids that name no place. One at a time: a fetch that is under way is swept.
    """
    kept = _needed(lease)
    for uri in kept:
        _mark(directory_of(root, uri))
    kept = kept.union(*map(_needed, beside))
    for left in root.glob("*/.fetch-*"):  # of a process that was killed: one at a time works here
        if _FETCHING.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    used = 0
    for marker in sorted(root.glob(f"*/{OWN}*"), key=_last_used, reverse=True):
        directory = marker.with_name(marker.name.removeprefix(OWN))
        used += sum(p.stat().st_size for p in _files(directory))
        if used > most_bytes and f"{directory.parent.name}/{directory.name}" not in kept:
            shutil.rmtree(directory, ignore_errors=True)
            marker.unlink(missing_ok=True)


def _needed(lease: Lease) -> set[str]:
    """Where it writes, and where its parent lies."""
    return {f"{lease.adapter_id}/{lease.run_id}"} | ({lease.parent.uri} if lease.parent else set())


def _mark(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.with_name(f"{OWN}{directory.name}").touch()


def _last_used(marker: Path) -> float:
    return marker.stat().st_mtime


def _files(directory: Path) -> Iterable[Path]:
    return (p for p in directory.rglob("*") if p.is_file())
