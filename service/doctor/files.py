"""Directories against rows: every version's bytes, what lies there for nobody, and who may read and write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from sqlalchemy import select

from api_schemas.worker import FileEntry
from service import admission, archive
from service.db.engine import Database, clock
from service.db.tables import Adapter, Version
from service.doctor.findings import Finding
from service.errors import Unavailable, VersionRejected
from service.serving import garbage
from service.settings import Settings
from service.storage.base import Storage
from service.storage.choice import open_storage
from service.store import adapters

SECRETS = ("server.secret", "client.key", "worker.key")


def check(database: Database, settings: Settings, grace: float) -> Iterator[Finding]:
    """`grace`: seconds for which what belongs to nobody may still come to belong to somebody."""
    try:
        storage = open_storage(settings)
        storage.check()
        yield from _stored(database, storage, settings, grace)
    except Unavailable as error:
        place = settings.storage or str(settings.adapters_root)
        yield Finding("adapters_missing", place, f"{error.message} Mount, restore or reach it.")
        return
    for path in archive.orphans(database, settings.archives_root):
        yield Finding("orphan_archive", str(path), "No version has these bytes.", path.unlink)
    yield from _permissions(settings)


def _stored(database: Database, storage: Storage, settings: Settings, grace: float) -> Iterator[Finding]:
    yield from _versions(database, storage, settings.adapters_root)
    for orphan in garbage.orphans(database, storage, grace):
        message = f"It belongs to no version: {orphan.why}."
        remove = partial(garbage.remove, database, storage, orphan)
        yield Finding("orphan_directory", storage.where(orphan.adapter_id, orphan.name), message, remove)
    yield from _adapters(database, storage, grace)
    if not storage.remote:
        yield from _strange(settings.adapters_root)


def _versions(database: Database, storage: Storage, root: Path) -> Iterator[Finding]:
    with database.read() as s:
        rows = s.execute(
            select(Version, Adapter)
            .join(Adapter, Adapter.id == Version.adapter_id)
            .where(Adapter.deleted_at.is_(None), Version.files_doomed_at.is_(None))
            .order_by(Version.adapter_id, Version.n)
        ).all()
    for version, adapter in rows:
        files = [FileEntry.model_validate(f) for f in version.files]
        if (why := _damage(version, files, storage)) is None:
            continue
        name = f"{version.adapter_id} v{version.n}"
        if storage.remote and _is_in(root / version.uri, files):
            repair = partial(_move, storage, version.uri, files, root)
            yield Finding("files_not_stored", name, "Its files are in the adapters directory alone.", repair)
            continue
        if version.n in (adapter.live_n, adapter.head_n):
            what = "restore it from a backup, or promote an earlier version"
            yield Finding("files_damaged", name, f"{why} It is live or the training head: {what}.")
        else:
            yield Finding("files_damaged", name, f"{why} Nothing points to it.", _given_up(database, version))


def _damage(version: Version, files: list[FileEntry], storage: Storage) -> str | None:
    """What is wrong with its files, byte for byte."""
    if admission.version_digest(files) != version.digest:
        return "Its list of files has not the digest that was committed."
    try:
        storage.examine(version.uri, files)
    except VersionRejected as error:
        return error.message
    except OSError as error:
        return f"Its files cannot be read: {error.strerror}."
    return None


def _is_in(directory: Path, files: list[FileEntry]) -> bool:
    """Whether a directory from the time before the object storage holds the version."""
    try:
        admission.check_files(directory, files)
    except (VersionRejected, OSError):
        return False
    return True


def _move(storage: Storage, uri: str, files: list[FileEntry], root: Path) -> None:
    for entry in files:
        storage.receive(uri, entry.sha256, root / uri / entry.name)
    storage.seal(uri, files)


def _given_up(database: Database, version: Version) -> Callable[[], None]:
    """From now on nobody loads it; retention takes away what is left."""

    def repair() -> None:
        with database.write() as s:
            adapter = adapters.locked(s, version.adapter_id)
            if version.n not in (adapter.live_n, adapter.head_n):
                s.get_one(Version, (version.adapter_id, version.n)).files_doomed_at = clock(s)

    return repair


def _adapters(database: Database, storage: Storage, grace: float) -> Iterator[Finding]:
    """All that is kept for adapters that do not exist, or whose files were said to be gone."""
    with database.read() as s:
        known = {a.id: a.purged_at is not None for a in s.scalars(select(Adapter))}
    for adapter_id in storage.adapters():
        if known.get(adapter_id) is not False and storage.touched(adapter_id, "") < time.time() - grace:
            why = "was deleted" if adapter_id in known else "does not exist"
            purge = partial(storage.purge, adapter_id)
            yield Finding("unknown_adapter", storage.where(adapter_id), f"Its adapter {why}.", purge)


def _strange(root: Path) -> Iterator[Finding]:
    for path in sorted(root.iterdir()):
        if path.is_symlink() or not path.is_dir() or not path.name.startswith("adp_"):
            yield Finding("strange_file", str(path), "It is nothing of ours.", level="note")


def _permissions(settings: Settings) -> Iterator[Finding]:
    """Secrets are their owner's; what others could write, they could have served."""
    for path in (settings.data_dir / name for name in SECRETS):
        if path.exists() and path.stat().st_mode & 0o077:
            yield _closing(path, "secret_readable", "Others may read it.", 0o077)
    for path in sorted(settings.data_dir.glob("perennial.db*")):
        if path.stat().st_mode & 0o002:
            yield _closing(path, "writable_by_all", "Everybody may write to it.", 0o002)
    for path in (settings.adapters_root, *sorted(settings.adapters_root.rglob("*"))):
        if not path.is_symlink() and path.stat().st_mode & 0o002:
            yield _closing(path, "writable_by_all", "Everybody may write to it.", 0o002)


def _closing(path: Path, code: str, message: str, bits: int) -> Finding:
    return Finding(code, str(path), message, lambda: path.chmod(path.stat().st_mode & 0o7777 & ~bits))
