"""From a version's row to a directory that an engine may load: checked byte by byte before each load."""

from __future__ import annotations

from dataclasses import dataclass

import anyio

from api_schemas.worker import Canary, FileEntry
from service.db.engine import Database
from service.db.tables import Adapter, Version
from service.errors import NotFound
from service.serving.names import served_name
from service.storage.base import Storage
from service.store import versions


@dataclass(frozen=True)
class Artifact:
    """One version as engines are told of it."""

    name: str
    path: str
    """The PEFT directory, as the engine sees it."""
    canary: Canary | None
    """What the trainer measured; None for uploads and older workers."""


class Artifacts:
    def __init__(self, database: Database, storage: Storage) -> None:
        self._db = database
        self._storage = storage

    async def checked(self, adapter_id: str, n: int) -> Artifact:
        """The version, after its files were compared with what was committed.

        Raises NotFound, Gone, VersionRejected, and Unavailable when the whole storage is away, which is no verdict on
        the version.
        """
        version = await anyio.to_thread.run_sync(self._row, adapter_id, n)
        files = [FileEntry.model_validate(f) for f in version.files]
        await anyio.to_thread.run_sync(self._storage.directory, version.uri, files)
        path = self._storage.engine_path(version.uri, version.digest)
        canary = Canary.model_validate(version.canary) if version.canary else None
        return Artifact(served_name(adapter_id, n), path, canary)

    def _row(self, adapter_id: str, n: int) -> Version:
        with self._db.read() as s:
            if s.get_one(Adapter, adapter_id).deleted_at is not None:  # its files may go at any moment
                raise NotFound("The adapter was deleted.", code="adapter_not_found", param="model")
            return versions.with_files(s.get_one(Version, (adapter_id, n)))
