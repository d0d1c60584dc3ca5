"""What a new installation needs before its first start: directories, schema and keys. Nothing has a default secret."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from service.db import migrate
from service.db.engine import Database
from service.settings import Settings
from service.store import keys


def prepare(settings: Settings, client_key: Path, worker_key: Path) -> str:
    """Migrate, and make the two key files unless they hold keys that are good. Safe to repeat. Returns the client's.

    Raises OSError where a directory cannot be written, Unavailable for a database that does not answer.
    """
    for directory in (settings.data_dir, settings.adapters_root, client_key.parent, worker_key.parent):
        directory.mkdir(parents=True, exist_ok=True)
    database = Database(settings.db_url)
    try:
        migrate.migrate(database)
        ring = keys.KeyRing(keys.server_secret(settings.data_dir / "server.secret"))
        key = _key(database, ring, client_key, keys.DEFAULT_TENANT, keys.CLIENT_SCOPES)
        _key(database, ring, worker_key, None, keys.WORKER_SCOPES)
    finally:
        database.close()
    return key


def _key(database: Database, ring: keys.KeyRing, path: Path, tenant: str | None, scopes: Iterable[str]) -> str:
    if path.exists():
        kept = path.read_text().strip()
        with database.read() as s:
            if ring.check(s, kept) is not None:
                return kept
    with database.write() as s:
        key = ring.create(s, tenant=tenant, name=f"first run: {path.name}", scopes=scopes)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(key + "\n")
    return key
