"""Jobs: the work that a feedback batch causes, in OpenAI's fine-tuning vocabulary."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from api_schemas.base import Response

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
T = TypeVar("T")


class StepMetrics(Response):
    """One optimizer step. Unknown numbers of newer workers pass through in `extra`."""

    step: Annotated[int, Field(ge=0, lt=2**31)]
    loss: float
    gap: float | None = None
    """Mean divergence from teacher to student per response token, nats."""
    mean_is_ratio: float | None = None
    max_is_ratio: float | None = None
    clip_fraction: float | None = None
    base_kl: float | None = None
    """k3 estimate of KL(student || base) per response token, nats."""
    entropy: float | None = None
    """Of the student's next-token distribution, nats."""
    grad_norm: float | None = None
    """Before clipping."""
    learning_rate: float | None = None
    response_tokens: int | None = None
    seconds: float | None = None


class JobProgress(Response):
    phase: str
    step: int = 0
    steps: int = 0


class JobError(Response):
    code: str
    message: str


class Job(Response):
    id: str
    object: Literal["job"] = "job"
    adapter: str
    batch_id: str
    status: JobStatus
    sequence: int
    """Position in the adapter's order of feedback."""
    attempts: int
    progress: JobProgress | None = None
    metrics: list[StepMetrics] = []
    version: int | None = None
    published: bool = False
    """True once the version of this job has been served."""
    error: JobError | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None


class Page(Response, Generic[T]):
    """OpenAI's list shape; `after` takes the last id seen."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
