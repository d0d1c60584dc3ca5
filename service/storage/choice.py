"""The storage that the settings name."""

from __future__ import annotations

import hashlib

from service.settings import Settings
from service.storage.base import Storage
from service.storage.bucket import Bucket
from service.storage.local import LocalStorage
from service.storage.objects import ObjectStorage
from service.store.keys import server_secret


def open_storage(settings: Settings) -> Storage:
    """Nothing is asked of it yet."""
    if settings.storage is None:
        return LocalStorage(settings.adapters_root, settings.engine_adapters_root)
    # Hosts of one installation have the same secret, and others have not.
    owner = hashlib.sha256(b"perennial storage " + server_secret(settings.data_dir / "server.secret")).hexdigest()[:32]
    bucket = Bucket(settings.storage, seconds=settings.storage_seconds)
    return ObjectStorage(bucket, settings.adapters_root, settings.engine_adapters_root, owner)
