"""The tables. What must always be true is written here as a constraint, not in process-local locks."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Id = String(64)

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[Any]: JSON,
        list[str]: JSON,
        list[int]: JSON,
        list[float]: JSON,
    }


class Tenant(Base):
    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    created_at: Mapped[float]


class ApiKey(Base):
    """`id` is the key's public part; of the secret only a keyed digest is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    """None: a worker's key, which belongs to no tenant."""
    name: Mapped[str] = mapped_column(String(128))
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class Adapter(Base):
    """The row is the mutex of its adapter: sequence, lease and fencing token live here."""

    __tablename__ = "adapters"
    __table_args__ = (
        # A name may be used again after deletion; the id never is.
        Index(
            "uq_adapters_tenant_id_name_alive",
            "tenant_id",
            "name",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "ix_adapters_open", "base_model", sqlite_where=text("open_jobs > 0"), postgresql_where=text("open_jobs > 0")
        ),
        CheckConstraint("open_jobs >= 0", name="open_jobs_counted"),
        CheckConstraint("head_n < next_n AND live_n < next_n", name="pointers_exist"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(63))
    base_model: Mapped[str] = mapped_column(String(256))
    lora: Mapped[dict[str, Any]]
    training: Mapped[dict[str, Any]]
    head_n: Mapped[int] = mapped_column(default=0)
    """What the next run is trained from. 0 is the base model."""
    live_n: Mapped[int] = mapped_column(default=0)
    """What the alias points to. The publisher moves it to head_n."""
    next_n: Mapped[int] = mapped_column(default=1)
    next_seq: Mapped[int] = mapped_column(default=1)
    open_jobs: Mapped[int] = mapped_column(default=0)
    token: Mapped[int] = mapped_column(default=0)
    lease_run: Mapped[str | None] = mapped_column(Id)
    lease_until: Mapped[float | None]
    run_after: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    purged_at: Mapped[float | None]
    """When the files of a deleted adapter were removed."""


class Rollout(Base):
    """An answer as the engine gave it. Ids and log-probs are the engine's own; what is missing is NULL."""

    __tablename__ = "rollouts"
    __table_args__ = (Index("ix_rollouts_tenant_id_created_at", "tenant_id", "created_at"),)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"))
    """None: the base model answered under its own name."""
    base_model: Mapped[str] = mapped_column(String(256))
    version_n: Mapped[int]
    messages: Mapped[list[Any]]
    """Empty for a text completion."""
    tools: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    response: Mapped[str] = mapped_column(Text)
    reply: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Reasoning and tool calls, where the answer is more than text."""
    prompt_token_ids: Mapped[list[int]]
    response_token_ids: Mapped[list[int]]
    logprobs: Mapped[list[float] | None]
    logprobs_mode: Mapped[str] = mapped_column(String(32))
    """What the engine's log-probs mean, e.g. `raw_logprobs`: before temperature and top-p."""
    sampling: Mapped[dict[str, Any]]
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[float]


class Batch(Base):
    __tablename__ = "feedback_batches"
    # The same key from the same tenant is the same batch; NULL keys do not collide.
    __table_args__ = (UniqueConstraint("tenant_id", "idempotency_key"),)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_hash: Mapped[str] = mapped_column(String(64))
    training: Mapped[dict[str, Any]]
    item_count: Mapped[int]
    created_at: Mapped[float]


class Item(Base):
    """One remark. Either `rollout_id`, or `messages` and `response` for text from elsewhere."""

    __tablename__ = "feedback_items"
    __table_args__ = (
        UniqueConstraint("batch_id", "position"),
        CheckConstraint("(rollout_id IS NULL) = (response IS NOT NULL)", name="one_answer"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    batch_id: Mapped[str] = mapped_column(ForeignKey("feedback_batches.id"))
    position: Mapped[int]
    rollout_id: Mapped[str | None] = mapped_column(ForeignKey("rollouts.id"))
    messages: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    response: Mapped[str | None] = mapped_column(Text)
    feedback: Mapped[str] = mapped_column(Text)
    demonstration: Mapped[str | None] = mapped_column(Text)
    standing: Mapped[bool]


class Job(Base):
    """queued -> running -> succeeded; running -> queued on error or a lost lease; queued | running -> cancelled;
    running -> failed when trying again cannot help or was tried often enough."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("adapter_id", "seq"),
        Index(
            "ix_jobs_open",
            "adapter_id",
            "seq",
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        Index("ix_jobs_tenant_id_created_at", "tenant_id", "created_at"),
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state_known"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    batch_id: Mapped[str] = mapped_column(ForeignKey("feedback_batches.id"), unique=True)
    seq: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), default="queued")
    attempts: Mapped[int] = mapped_column(default=0)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id"))
    """The newest run that took this job."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    version_n: Mapped[int | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class Run(Base):
    """One attempt at training, by one worker, under one fencing token."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("adapter_id", "token"),)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    token: Mapped[int]
    worker_id: Mapped[str] = mapped_column(String(128))
    parent_n: Mapped[int]
    seed: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), default="running")
    """running | committed | failed | released | lost | cancelled | superseded"""
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]


class Step(Base):
    __tablename__ = "run_steps"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    metrics: Mapped[dict[str, Any]]


class Version(Base):
    """Immutable but for `status`, `published_at`, `rejection` and the times of its files' end."""

    __tablename__ = "versions"
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True)
    parent_n: Mapped[int]
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), unique=True)
    uri: Mapped[str] = mapped_column(String(256), unique=True)
    digest: Mapped[str] = mapped_column(String(80))
    files: Mapped[list[Any]]
    size_bytes: Mapped[int]
    training: Mapped[dict[str, Any]]
    seed: Mapped[int]
    metrics: Mapped[list[Any]]
    items: Mapped[list[Any]]
    """How each feedback item was used (worker's report)."""
    standing: Mapped[list[str]]
    training_seconds: Mapped[float]
    status: Mapped[str] = mapped_column(String(16), default="pending")
    rejection: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    published_at: Mapped[float | None]
    source: Mapped[str] = mapped_column(String(16), default="training")
    """training | upload"""
    canary: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The trainer's log-probs of the canary's tokens (wire: Canary)."""
    files_doomed_at: Mapped[float | None]
    """From now on nobody loads them; they are removed once no engine knows the version."""
    files_removed_at: Mapped[float | None]


class Application(Base):
    """The database itself refuses to apply a job twice: `job_id` is the key."""

    __tablename__ = "applications"
    __table_args__ = (Index("ix_applications_adapter_id_version_n", "adapter_id", "version_n"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    version_n: Mapped[int]


class Worker(Base):
    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(256))
    last_seen_at: Mapped[float]
