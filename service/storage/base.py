"""What the service asks of a place for versions' files. A uri is `<adapter id>/<run id>`; a place is never reused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from api_schemas.worker import FileEntry

UPLOADS = ".uploads"
"""Name, beside an adapter's runs, of the files that wait for the commit of an upload."""
GOING = ".gone-"
"""Prefix of a name that is being removed."""


class Storage(Protocol):
    remote: bool
    """Workers send and fetch files through the service, and each host's engines are those of its own service."""
    sweep_seconds: float
    """How often to look through all of it for what nobody refers to."""

    def prepare(self) -> None:
        """Before the first use. Raises Unavailable with what to change."""

    def check(self) -> None:
        """Raises Unavailable when all of it is away."""

    def directory(self, uri: str, files: Sequence[FileEntry]) -> Path:
        """The version's directory here, each byte checked just now. Raises VersionRejected, Unavailable, OSError."""

    def engine_path(self, uri: str, digest: str) -> str:
        """Where engines find the directory's `adapter/`, once `directory` has answered."""

    def examine(self, uri: str, files: Sequence[FileEntry]) -> None:
        """Check every byte where it is kept. Raises as `directory`."""

    def receive(self, uri: str, sha256: str, path: Path) -> None:
        """Take one file of a run that is to be committed; `path` was checked and is the caller's to remove."""

    def seal(self, uri: str, files: Sequence[FileEntry]) -> None:
        """Before a version is committed and after `directory`. Raises VersionRejected if the place is taken."""

    def landing(self, adapter_id: str, run_id: str) -> Path:
        """Where to put an uploaded version's directory together, by rename."""

    def publish(self, uri: str, files: Sequence[FileEntry]) -> None:
        """Take the directory from its landing place, and seal it."""

    def is_sealed(self, uri: str) -> bool:
        """Asked under the adapter's lock: is it still there for a commit?"""

    def discard(self, uri: str) -> None:
        """Remove what was published and not committed, as far as can be: the rest is garbage."""

    def stage(self, adapter_id: str, sha256: str, path: Path) -> None:
        """Keep a file of an upload until its commit; `path` is where this host keeps it."""

    def fetch_staged(self, adapter_id: str, sha256: str, path: Path) -> None:
        """Bring a staged file to `path`, if it was staged through another host and is there."""

    def unstage(self, adapter_id: str, sha256: str) -> None:
        """It was committed."""

    def adapters(self) -> list[str]:
        """Ids of all adapters that have anything here, sorted."""

    def names(self, adapter_id: str) -> list[str]:
        """What an adapter has here: runs, and what is being made or removed. Sorted."""

    def where(self, adapter_id: str, name: str = "") -> str:
        """For people to find it."""

    def touched(self, adapter_id: str, name: str) -> float:
        """When anything in it was last written, Unix seconds; now, if it is going at this moment."""

    def hide(self, adapter_id: str, name: str) -> str:
        """Under the adapter's lock: from now on it can be sealed no more. Its name from now on."""

    def clear(self, adapter_id: str, name: str) -> bool:
        """Remove it; whether it is gone."""

    def purge(self, adapter_id: str) -> None:
        """Remove all that an adapter has."""

    def tidy(self, keep: Collection[str]) -> None:
        """Remove from this host what is kept elsewhere too, except versions with these digests."""
