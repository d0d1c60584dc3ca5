"""What an Idempotency-Key brought before: for a group of requests in one statement."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Dialect, FromClause, select, tuple_
from sqlalchemy.engine import Connection

from api_schemas.feedback import FeedbackBatch
from service.db.prepared import Prepared, Statement
from service.db.tables import Adapter, Base, Batch, Job

Key = tuple[str, str]
"""(tenant's id, Idempotency-Key)"""
_BATCHES, _JOBS, _ADAPTERS = (Base.metadata.tables[t.__tablename__].c for t in (Batch, Job, Adapter))


def _same_keys(_: Dialect, keys: FromClause) -> Statement:
    key = tuple_(_BATCHES.tenant_id, _BATCHES.idempotency_key)
    of_batch = (_BATCHES.tenant_id, _BATCHES.idempotency_key, _BATCHES.body_hash)
    of_answer = (_BATCHES.id, _ADAPTERS.name, _JOBS.id, _JOBS.state, _BATCHES.item_count, _JOBS.version_n)
    return (
        select(*of_batch, *of_answer, _BATCHES.created_at)
        .join_from(Batch, Adapter, _ADAPTERS.id == _BATCHES.adapter_id)
        .join(Job, _JOBS.batch_id == _BATCHES.id)
        .where(key.in_(select(keys.c.tenant_id, keys.c.idempotency_key)))
        .order_by(_JOBS.seq)  # of several jobs the newest is kept: a rebuild trains a batch once more
    )


_SAME_KEYS = Prepared(_same_keys, _BATCHES.tenant_id, _BATCHES.idempotency_key)


def known(connection: Connection, keys: Collection[Key]) -> dict[Key, tuple[str, FeedbackBatch]]:
    """Of those keys that were used: the body's hash and the answer as it is now."""
    if not keys:
        return {}
    sent = [{"tenant_id": tenant, "idempotency_key": key} for tenant, key in sorted(keys)]
    found = {}
    for tenant, key, digest, batch, adapter, job, state, items, version, created in _SAME_KEYS.run(connection, sent):
        found[tenant, key] = (
            digest,
            FeedbackBatch(
                id=batch,
                adapter=adapter,
                job_id=job,
                status=state,
                item_count=items,
                version=version,
                created_at=int(created),
            ),
        )
    return found
