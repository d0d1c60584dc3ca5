"""An uploaded version, in one transaction under the adapter's mutex."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from api_schemas.worker import FileEntry
from service import admission
from service.db.engine import clock
from service.db.tables import Adapter, Run, Version
from service.store import adapters, events, rebuild


def known(s: Session, adapter: Adapter, weights_sha256: str) -> Version | None:
    """The head, if it is an upload of these very weights: the answer to its commit may have been lost."""
    head = s.get(Version, (adapter.id, adapter.head_n))
    if head is None or head.source != "upload":
        return None
    return head if any(f["sha256"] == weights_sha256 for f in head.files) else None


def commit(s: Session, adapter: Adapter, run_id: str, files: Sequence[FileEntry]) -> Version:
    """The next version, its parent the head as it is now. A run that trains meanwhile is fenced, its jobs queued again.

    What the tenant said before still stands: the parent's standing feedback goes on. Raises Conflict during a rebuild.
    """
    adapter = adapters.locked(s, adapter.id)
    rebuild.check_none_runs(s, adapter)
    parent = s.get(Version, (adapter.id, adapter.head_n))
    parent_n, n, now = adapter.head_n, adapter.next_n, clock(s)
    adapter.next_n = n + 1
    adapters.move_head(s, adapter, n)
    s.add(
        Run(
            id=run_id, adapter_id=adapter.id, token=adapter.token, worker_id="upload", parent_n=parent_n, seed=0,
            state="committed", started_at=now, ended_at=now,
        )
    )  # fmt: skip
    s.flush()
    version = Version(
        adapter_id=adapter.id, n=n, parent_n=parent_n, run_id=run_id, uri=f"{adapter.id}/{run_id}",
        digest=admission.version_digest(files), files=[f.model_dump() for f in files],
        size_bytes=sum(f.size for f in files), training={}, seed=0, metrics=[], items=[],
        standing=list(parent.standing) if parent else [], training_seconds=0.0, created_at=now, source="upload",
    )  # fmt: skip
    s.add(version)
    events.record(s, adapter, "version.created", now, version=n)
    s.flush()
    return version
