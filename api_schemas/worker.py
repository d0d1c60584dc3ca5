"""What service and worker say to each other. A worker holds a URL and a token, never the database."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, StringConstraints, model_validator

from api_schemas.base import Identifier, ModelName, Request, Response, Sha256
from api_schemas.jobs import JobError, JobProgress, StepMetrics
from api_schemas.training import LoraSettings, ResolvedTraining

FileName = Annotated[str, StringConstraints(pattern=r"^(adapter|trainer)/[A-Za-z0-9_.-]{1,64}$")]


class LeaseRequest(Request):
    worker_id: Identifier
    base_model: ModelName
    """The base that this worker holds; it gets jobs of that base alone."""
    wait_seconds: Annotated[float, Field(ge=0, le=30)] = 0.0
    """How long the service may hold the request until there is work."""


class LeasedItem(Response):
    """One answer with the remark on it. Token ids are the engine's own; None means the text never had any."""

    id: str
    messages: list[dict[str, Any]]
    """As OpenAI's chat has them, tool calls included."""
    tools: list[dict[str, Any]] | None = None
    """What the chat template was given besides the messages."""
    response: str
    prompt_token_ids: list[int] | None
    response_token_ids: list[int] | None
    behaviour_logprobs: list[float] | None
    """One per response token, natural log, as the engine gave them; None: the worker computes them and says so."""
    logprobs_mode: str | None = None
    """What those values mean: `raw_logprobs` before temperature and filters, `processed_logprobs` after."""
    sampling: dict[str, Any] = {}
    """How the answer was drawn, defaults included."""
    version: int | None
    """The version that answered; None for text from elsewhere."""
    feedback: str
    demonstration: str | None
    standing: bool


class FileEntry(Request):
    name: FileName
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class ParentVersion(Response):
    version: int
    uri: str
    """Directory below the adapters root: `<adapter id>/<run id>`."""
    digest: str
    files: list[FileEntry] = []
    """Empty where worker and service share a directory."""


class Lease(Response):
    kind: Literal["train", "preview"] = "train"
    """A preview ends with its result instead of a commit."""
    run_id: str
    token: int
    """Fencing token: grows with every lease of the adapter; an older one can change nothing."""
    lease_seconds: float
    adapter_id: str
    adapter: str
    base_model: str
    lora: LoraSettings
    training: ResolvedTraining
    seed: int
    parent: ParentVersion | None
    standing_feedback: list[str]
    """Of the parent version, oldest first."""
    files: Literal["shared", "http"] = "shared"
    """http: the parent's files are fetched from the service and the version's sent to it before the commit."""
    canary_prompt: str | None = None
    """What to record log-probs of; None: record none."""
    batch_ids: list[str]
    items: list[LeasedItem]


class Heartbeat(Request):
    token: int
    progress: JobProgress | None = None
    metrics: Annotated[list[StepMetrics], Field(max_length=256)] = []
    """Steps since the last heartbeat; sending one again is harmless."""


class HeartbeatReply(Response):
    lease_seconds: float
    cancelled: bool = False
    """True: stop, the lease is over."""


class ItemReport(Request):
    """How one feedback item was used."""

    id: Identifier
    behaviour: Literal["engine", "recomputed", "reference"]
    """Where the behaviour log-probs came from: the engine's own; computed under the weights the batch started from;
    or the engine's values before temperature and filters, of a version other than the parent: not what the answer was
    drawn with, but the nearest that is known."""
    taught: bool
    response_tokens: Annotated[int, Field(ge=0)]


class Canary(Request):
    """Log-probs of fixed tokens as the trainer computed them: every engine that loads the version is held to them."""

    token_ids: Annotated[list[int], Field(min_length=2, max_length=4096)]
    """The canary prompt in the model's chat template, and the base model's own next tokens."""
    logprobs: list[FiniteFloat]
    """Of every token but the first under the new version, raw, natural log."""
    parent_logprobs: list[FiniteFloat]
    """The same under what the version was trained from."""
    dtype: Literal["float32", "bfloat16"]
    """What the trainer computes in."""

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        if not len(self.logprobs) == len(self.parent_logprobs) == len(self.token_ids) - 1:
            raise ValueError("a log-prob for every token but the first is needed")
        return self


class CommitRequest(Request):
    token: int
    uri: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}$")]
    files: Annotated[list[FileEntry], Field(min_length=2, max_length=16)]
    standing_feedback: Annotated[list[str], Field(max_length=256)]
    metrics: Annotated[list[StepMetrics], Field(max_length=1024)]
    items: Annotated[list[ItemReport], Field(max_length=4096)] = []
    training_seconds: Annotated[float, Field(ge=0)]
    canary: Canary | None = None
    """None: from a worker that records none."""


class FileReceived(Response):
    sha256: Sha256
    size: int


class CommitReply(Response):
    version: int
    digest: str


class FailRequest(Request):
    token: int
    error: JobError
    retryable: bool
    """False: trying again cannot help (bad input, not a broken machine)."""


class ReleaseRequest(Request):
    """Give the lease back unused, e.g. at shutdown: the job is queued again and no attempt is counted."""

    token: int
