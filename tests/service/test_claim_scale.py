"""A claim costs the same however much is queued, and tenants with few adapters get their turns (small; the whole one is
`make check-claim`)."""

from __future__ import annotations

import pytest

from benchmarks.claim import Backlog, measured


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_claims_are_flat_in_the_backlog_and_fair(kind: str) -> None:
    short, long = (measured(kind, Backlog(jobs, adapters=50, tenants=5), claims=50) for jobs in (100, 6_000))
    for row in (short, long):
        assert row["claims"] == 50
        # Half of the adapters are one tenant's: first come, first served would give it half of the claims.
        assert row["largest_share"] == row["smallest_share"] == 0.2
    assert long["claim_cpu_ms_p50"] < 2 * short["claim_cpu_ms_p50"]
