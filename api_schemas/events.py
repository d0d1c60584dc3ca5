"""What happened: events of jobs and versions, as streams and webhooks carry them."""

from __future__ import annotations

from typing import Any

from api_schemas.base import Response
from api_schemas.jobs import JobProgress, StepMetrics


class Event(Response):
    """A change of a job, a version or an adapter. Small facts; never text that a user wrote."""

    type: str
    """E.g. `job.succeeded`, `version.published`."""
    adapter_id: str
    job_id: str | None = None
    version: int | None = None
    data: dict[str, Any] = {}
    """E.g. an error's code, or why a job waits again."""
    created_at: int
    """Unix seconds."""


class JobStep(Response):
    """`job.step`: one optimizer step of the run that has the job."""

    type: str = "job.step"
    job_id: str
    run_id: str
    metrics: StepMetrics


class JobPhase(Response):
    """`job.progress`: what the run is at."""

    type: str = "job.progress"
    job_id: str
    run_id: str
    progress: JobProgress
