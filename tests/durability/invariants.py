"""What must be true of the database at every moment, as queries that find whatever is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Query = Callable[[str], Sequence[Sequence[Any]]]

NEVER = {
    "a job applied that is neither done nor rejected afterwards": """
        SELECT a.job_id FROM applications a JOIN jobs j ON j.id = a.job_id
        JOIN versions v ON v.adapter_id = a.adapter_id AND v.n = a.version_n
        WHERE j.state <> 'succeeded' AND v.status <> 'rejected'""",
    "a job done without a version, or with another": """
        SELECT j.id FROM jobs j LEFT JOIN applications a ON a.job_id = j.id
        WHERE j.state = 'succeeded' AND (a.version_n IS NULL OR a.version_n <> j.version_n)""",
    "versions out of the order of their feedback": """
        SELECT a.job_id, b.job_id FROM applications a JOIN jobs i ON i.id = a.job_id
        JOIN versions v ON v.adapter_id = a.adapter_id AND v.n = a.version_n
        JOIN applications b ON b.adapter_id = a.adapter_id JOIN jobs j ON j.id = b.job_id
        JOIN versions w ON w.adapter_id = b.adapter_id AND w.n = b.version_n
        WHERE i.seq < j.seq AND a.version_n > b.version_n
        AND v.status <> 'rejected' AND w.status <> 'rejected'""",  # what a rejected one had learnt was undone
    "versions out of the order of their fencing tokens": """
        SELECT v.adapter_id, v.n, w.n FROM versions v JOIN runs r ON r.id = v.run_id
        JOIN versions w ON w.adapter_id = v.adapter_id JOIN runs t ON t.id = w.run_id
        WHERE v.n < w.n AND r.token >= t.token""",
    "a version with another parent than its run": """
        SELECT v.adapter_id, v.n FROM versions v JOIN runs r ON r.id = v.run_id
        WHERE v.parent_n <> r.parent_n OR r.state <> 'committed' OR v.parent_n >= v.n""",
    "a parent that is not there": """
        SELECT v.adapter_id, v.n FROM versions v
        LEFT JOIN versions p ON p.adapter_id = v.adapter_id AND p.n = v.parent_n
        WHERE v.parent_n > 0 AND p.n IS NULL""",
    "version numbers with a gap": """
        SELECT a.id FROM adapters a
        WHERE a.next_n <> 1 + (SELECT count(*) FROM versions v WHERE v.adapter_id = a.id)""",
    "a job number that was not given out": """
        SELECT j.id FROM jobs j JOIN adapters a ON a.id = j.adapter_id WHERE j.seq >= a.next_seq OR j.seq < 1""",
    "events with a gap": """
        SELECT a.id FROM adapters a WHERE a.events_n <> (SELECT count(*) FROM events e WHERE e.adapter_id = a.id)""",
    "a run with a part of a training batch": """
        SELECT i.id, j.id FROM jobs i JOIN jobs j ON j.adapter_id = i.adapter_id AND j.together = i.together
        WHERE i.state = 'running' AND j.state = 'queued'""",
    "open jobs miscounted": """
        SELECT a.id FROM adapters a WHERE a.open_jobs <> (SELECT count(*) FROM jobs j
        WHERE j.adapter_id = a.id AND j.state IN ('queued', 'running'))""",
    "half a batch": """
        SELECT b.id FROM feedback_batches b
        WHERE b.item_count <> (SELECT count(*) FROM feedback_items i WHERE i.batch_id = b.id)
        OR NOT EXISTS (SELECT 1 FROM jobs j WHERE j.batch_id = b.id)""",
    "head or alias on a version that is not there or was rejected": """
        SELECT a.id FROM adapters a
        LEFT JOIN versions h ON h.adapter_id = a.id AND h.n = a.head_n
        LEFT JOIN versions l ON l.adapter_id = a.id AND l.n = a.live_n
        WHERE (a.head_n > 0 AND (h.n IS NULL OR h.status = 'rejected'))
        OR (a.live_n > 0 AND (l.n IS NULL OR l.status <> 'published'))""",
    "a run that counts as running without the lease": """
        SELECT r.id FROM runs r JOIN adapters a ON a.id = r.adapter_id
        WHERE r.state = 'running' AND (a.lease_run IS NULL OR a.lease_run <> r.id OR a.token <> r.token)""",
    "a job that runs nowhere": """
        SELECT j.id FROM jobs j JOIN adapters a ON a.id = j.adapter_id
        WHERE j.state = 'running' AND (a.lease_run IS NULL OR j.run_id <> a.lease_run)""",
    "two jobs of one batch": "SELECT batch_id FROM jobs GROUP BY batch_id HAVING count(*) > 1",
    "a lease without a job": """
        SELECT a.id FROM adapters a WHERE a.lease_run IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.run_id = a.lease_run AND j.state = 'running')""",
}


def violations(query: Query) -> list[str]:
    """Every rule that is broken, with the first rows that break it."""
    return [f"{rule}: {list(map(tuple, rows[:3]))}" for rule, sql in NEVER.items() if (rows := query(sql))]
