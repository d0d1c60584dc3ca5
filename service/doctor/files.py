"""Directories against rows: every version's bytes, what lies there for nobody, and who may read and write."""

from __future__ import annotations

import shutil
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
from service.errors import VersionRejected
from service.serving import garbage
from service.settings import Settings
from service.store import adapters

SECRETS = ("server.secret", "client.key", "worker.key")


def check(database: Database, settings: Settings, grace: float) -> Iterator[Finding]:
    """`grace`: seconds for which what belongs to nobody may still come to belong to somebody."""
    root = settings.adapters_root
    if not root.is_dir():
        yield Finding("adapters_missing", str(root), "The adapters directory is not there: mount or restore it.")
        return
    yield from _versions(database, root)
    for orphan in garbage.orphans(database, root, grace):
        message = f"It belongs to no version: {orphan.why}."
        yield Finding("orphan_directory", str(orphan.path), message, partial(garbage.remove, database, orphan))
    yield from _adapters(database, root, grace)
    yield from _archives(database, settings.archives_root)
    yield from _permissions(settings)


def _versions(database: Database, root: Path) -> Iterator[Finding]:
    with database.read() as s:
        rows = s.execute(
            select(Version, Adapter)
            .join(Adapter, Adapter.id == Version.adapter_id)
            .where(Adapter.deleted_at.is_(None), Version.files_doomed_at.is_(None))
            .order_by(Version.adapter_id, Version.n)
        ).all()
    for version, adapter in rows:
        if (why := _damage(version, root)) is None:
            continue
        name = f"{version.adapter_id} v{version.n}"
        if version.n in (adapter.live_n, adapter.head_n):
            what = "restore it from a backup, or promote an earlier version"
            yield Finding("files_damaged", name, f"{why} It is live or the training head: {what}.")
        else:
            yield Finding("files_damaged", name, f"{why} Nothing points to it.", _given_up(database, version))


def _damage(version: Version, root: Path) -> str | None:
    """What is wrong with its files, byte for byte."""
    files = [FileEntry.model_validate(f) for f in version.files]
    if admission.version_digest(files) != version.digest:
        return "Its list of files has not the digest that was committed."
    try:
        admission.check_files(root / version.uri, files)
    except VersionRejected as error:
        return error.message
    except OSError as error:
        return f"Its files cannot be read: {error.strerror}."
    return None


def _given_up(database: Database, version: Version) -> Callable[[], None]:
    """From now on nobody loads it; retention takes away what is left."""

    def repair() -> None:
        with database.write() as s:
            adapter = adapters.locked(s, version.adapter_id)
            if version.n not in (adapter.live_n, adapter.head_n):
                s.get_one(Version, (version.adapter_id, version.n)).files_doomed_at = clock(s)

    return repair


def _adapters(database: Database, root: Path, grace: float) -> Iterator[Finding]:
    """Whole directories of adapters that do not exist, or whose files were said to be gone."""
    with database.read() as s:
        known = {a.id: a.purged_at is not None for a in s.scalars(select(Adapter))}
    for path in sorted(root.iterdir()):
        if known.get(path.name) is False:
            continue
        if path.is_symlink() or not path.is_dir() or not path.name.startswith("adp_"):
            yield Finding("strange_file", str(path), "It is nothing of ours.", level="note")
        elif path.stat().st_mtime < time.time() - grace:
            why = "was deleted" if path.name in known else "does not exist"
            yield Finding("unknown_adapter", str(path), f"Its adapter {why}.", partial(shutil.rmtree, path))


def _archives(database: Database, root: Path) -> Iterator[Finding]:
    with database.read() as s:
        digests = s.scalars(select(Version.digest).where(Version.files_removed_at.is_(None)))
        wanted = {archive.path_of(root, digest).name for digest in digests}
    for path in sorted(root.glob("*")):
        if path.suffix == ".zip" and path.name not in wanted:
            yield Finding("orphan_archive", str(path), "No version has these bytes.", path.unlink)


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
