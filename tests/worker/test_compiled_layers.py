"""A worker that was told to compile its base model's layers."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.slow
def test_jobs_say_that_their_layers_were_compiled(service: Any, another_worker: Any) -> None:
    """The second job, of another adapter, takes over what the first one compiled."""
    worker = another_worker(PERENNIAL_WORKER_COMPILE_LAYERS="true")
    seconds = []
    for name in ("first", "second"):
        job = service.enqueue(f"adp_compiled_{name}")
        steps = service.wait_for_state(job, "succeeded").commit.metrics
        assert [(s.path, s.plan.compiled, s.fallback_reason) for s in steps] == [("fast", True, None)] * 2
        seconds.append(steps[0].seconds)
    assert seconds[1] < seconds[0] / 3, seconds
    assert "cannot be compiled" not in worker.log
