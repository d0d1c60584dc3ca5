"""The tables. What must always be true is written here as a constraint, not in process-local locks."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base as Base
from service.db.base import Id
from service.db.queue_tables import Application as Application
from service.db.queue_tables import Event as Event
from service.db.queue_tables import Job as Job
from service.db.queue_tables import Leader as Leader
from service.db.queue_tables import Run as Run
from service.db.queue_tables import ServiceProcess as ServiceProcess
from service.db.queue_tables import Step as Step
from service.db.queue_tables import Turn as Turn
from service.db.queue_tables import Worker as Worker
from service.db.webhook_tables import Webhook as Webhook
from service.db.webhook_tables import WebhookCursor as WebhookCursor
from service.db.webhook_tables import WebhookDelivery as WebhookDelivery


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
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    """Highest among its open jobs: what waits behind others lifts them all."""
    waits_since: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Since when it waits for its turn: its first open job came, or it had a turn."""
    paused_at: Mapped[float | None]
    blocked_by: Mapped[str | None] = mapped_column(Id)
    """A failed job after which nothing runs until somebody decides (`on_failure` block)."""
    on_failure: Mapped[str] = mapped_column(String(8), default="skip", server_default="skip")
    """skip | block"""
    events_n: Mapped[int] = mapped_column(default=0, server_default="0")
    """Number of its newest event."""
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    purged_at: Mapped[float | None]
    """When the files of a deleted adapter were removed."""
    held_until_seq: Mapped[int | None]
    """The alias stays where it is while a job up to this one is open: a rebuild is shown when it is whole."""


class Rollout(Base):
    """An answer as the engine gave it. Ids and log-probs are the engine's own; what is missing is NULL."""

    __tablename__ = "rollouts"
    __table_args__ = (
        Index("ix_rollouts_tenant_id_created_at", "tenant_id", "created_at"),
        Index("ix_rollouts_tenant_id_person", "tenant_id", "person"),
        Index("ix_rollouts_created_at", "created_at"),
    )
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
    person: Mapped[str | None] = mapped_column(String(64))
    """Keyed digest of the caller's `user`: finds what is theirs, and does not say who they are."""
    created_at: Mapped[float]


class Batch(Base):
    __tablename__ = "feedback_batches"
    # The same key from the same tenant is the same batch; NULL keys do not collide.
    __table_args__ = (
        UniqueConstraint("tenant_id", "idempotency_key"),
        Index("ix_feedback_batches_created_at", "created_at"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_hash: Mapped[str] = mapped_column(String(64))
    """Empty once an item was erased: it would tell a guess from the truth."""
    training: Mapped[dict[str, Any]]
    item_count: Mapped[int]
    created_at: Mapped[float]


class Item(Base):
    """One remark. Either `rollout_id`, or `messages` and `response` for text from elsewhere.

    Of an erased one only the row is left, without any text: versions still say that they learnt from it.
    """

    __tablename__ = "feedback_items"
    __table_args__ = (
        UniqueConstraint("batch_id", "position"),
        Index("ix_feedback_items_rollout_id", "rollout_id"),
        Index("ix_feedback_items_person", "person"),
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
    person: Mapped[str | None] = mapped_column(String(64))
    """As a rollout's; of an item on a rollout, the rollout's own."""
    erased_at: Mapped[float | None]
    erased_by: Mapped[str | None] = mapped_column(String(16))
    """request | retention"""


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
    tainted_at: Mapped[float | None]
    """When feedback was erased that this version had learnt from, itself or through its parents."""
    retired_at: Mapped[float | None]
    """When a rebuild took its place: it loses its files as soon as it is neither live nor head."""


class Chore(Base):
    """Something that has to be done once more, whoever was killed meanwhile."""

    __tablename__ = "chores"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    wanted_at: Mapped[float]
