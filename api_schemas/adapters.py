"""Adapters and their immutable versions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from api_schemas.base import AdapterName, ModelName, Request, Response, Sha256
from api_schemas.jobs import StepMetrics
from api_schemas.training import LoraSettings, TrainingSettings

OnFailure = Literal["skip", "block"]


class AdapterCreate(Request):
    name: AdapterName
    base_model: ModelName | None = None
    """Defaults to the model that the engine serves."""
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    on_failure: OnFailure = "skip"
    """What follows when a job has failed for good: `skip`: the next one. `block`: nothing, until somebody queues the
    job again or resumes the adapter."""


class AdapterChange(Request):
    on_failure: OnFailure
    """For jobs that fail from now on: an adapter that is blocked stays so until somebody decides."""


class Promote(Request):
    version: Annotated[int, Field(ge=0, lt=2**31)]
    """0 is the base model itself."""


class Adapter(Response):
    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    base_model: str
    live_version: int
    """What `model: name` is answered by; 0 = the base model."""
    head_version: int
    """What the next batch is trained from."""
    queued_jobs: int
    paused: bool = False
    """Queued work waits; chats and feedback go on."""
    blocked_by: str | None = None
    """The failed job after which nothing is trained until somebody decides (`on_failure` block)."""
    on_failure: OnFailure = "skip"
    lora: LoraSettings
    training: TrainingSettings
    created_at: int


class AdapterDeleted(Response):
    id: str
    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    deleted: bool = True


class UploadedFile(Response):
    """A file that is waiting for its commit; it is kept for an hour."""

    object: Literal["adapter.upload"] = "adapter.upload"
    name: str
    size_bytes: int
    sha256: str


class UploadCommit(Request):
    """Which of the uploaded files make the version, by the SHA-256 that each PUT answered."""

    config_sha256: Sha256
    weights_sha256: Sha256


VersionStatus = Literal["pending", "published", "rejected"]


class Version(Response):
    object: Literal["adapter.version"] = "adapter.version"
    adapter: str
    version: int
    parent: int
    """0 = trained from the base model."""
    source: Literal["training", "upload"]
    status: VersionStatus
    live: bool
    files: Literal["kept", "removed"]
    """`removed`: by the retention setting or after a rebuild; it can neither be served nor downloaded any more."""
    learnt_erased: bool = False
    """True: feedback was erased since that it had learnt from; `POST /v1/adapters/{adapter}/rebuild` replaces it."""
    digest: str
    """`sha256:` over the version's files."""
    size_bytes: int
    """Of the PEFT directory."""
    batch_ids: list[str]
    feedback_ids: list[str]
    standing_feedback: list[str]
    """Remarks that the next batch's teacher is told besides the new ones, oldest first."""
    training: dict[str, Any]
    seed: int
    metrics: list[StepMetrics] = []
    rejection: str | None = None
    created_at: int
