"""Jobs: the work that a feedback batch causes, in OpenAI's fine-tuning vocabulary."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from api_schemas.base import Response
from api_schemas.preview import Preview

JobKind = Literal["train", "replay", "preview"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
T = TypeVar("T")


class StepPlan(Response):
    """How much of the batch a step computed at a time."""

    micro_batch_tokens: int
    """Most tokens of one forward pass; fewer than planned once memory has run out."""
    micro_batches: int
    chunk_tokens: int | None = None
    """Response tokens whose logits existed at a time; null: by the size of the vocabulary."""
    checkpointing: bool = False
    compiled: bool = False
    """Whether the decoder layers of the step's own passes ran through torch.compile (`--compile-layers` of the
    worker)."""


class StepAudit(Response):
    """Largest differences between the path that trained and the plain one, over the step's micro-batches."""

    loss: float | None = None
    tokens: float | None = None
    """Of any value of any token."""
    gradient: float | None = None
    """Norm of the difference over the norm."""
    teacher: float | None = None
    """Of the teacher's log-probs that are kept. Null in any of these: it was not finite."""


class StepMetrics(Response):
    """One optimizer step. Unknown numbers of newer workers pass through in `extra`."""

    step: Annotated[int, Field(ge=0, lt=2**31)]
    loss: float | None
    """Null for a step that was skipped because its loss or gradient was not finite."""
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
    teacher_written: int | None = None
    """Answers of the batch that the teacher wrote (`rollouts`)."""
    seconds: float | None = None
    outcome: Literal["updated", "gap_closed", "non_finite"] | None = None
    """Whether the weights moved, and if not, why."""
    path: Literal["plain", "fast"] | None = None
    """Which of the two ways of computing the same step was taken."""
    fallback_reason: str | None = None
    """Why it was the plain one although the fast one was allowed, or why the worker could not compile the layers as it
    was told."""
    plan: StepPlan | None = None
    audit: StepAudit | None = None


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
    kind: JobKind = "train"
    """train: what feedback was sent for | replay: the same items once more | preview: nothing is learnt"""
    adapter: str
    batch_id: str
    status: JobStatus
    sequence: int
    """Position in the adapter's order of feedback."""
    priority: int = 0
    attempts: int
    """Those that came to nothing: errors and lost workers."""
    progress: JobProgress | None = None
    metrics: list[StepMetrics] = []
    version: int | None = None
    """The version that training made. With status `failed` it is one that no engine serves (`error` says why): it stays
    listed as `rejected`, the adapter goes on from its parent, and the feedback may be sent again."""
    published: bool = False
    """True once the version of this job has been served."""
    error: JobError | None = None
    result: Preview | None = None
    """Of a preview that has succeeded; only in `GET /v1/jobs/{job}`."""
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None


class Page(Response, Generic[T]):
    """OpenAI's list shape; `after` takes the last id seen."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
