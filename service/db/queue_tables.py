"""The tables of the queue: jobs, runs, what they changed, whose turn it is, and who publishes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, Id

OPEN = text("state IN ('queued', 'running')")
FAILED = text("state = 'failed'")


class Job(Base):
    """queued -> running -> succeeded; running -> queued on error or a lost lease; queued | running -> cancelled;
    running -> failed when trying again cannot help or was tried often enough; failed -> queued when somebody says so.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("adapter_id", "seq"),
        Index("ix_jobs_open", "adapter_id", "seq", sqlite_where=OPEN, postgresql_where=OPEN),
        Index("ix_jobs_failed", "tenant_id", "created_at", sqlite_where=FAILED, postgresql_where=FAILED),
        Index("ix_jobs_batch_id", "batch_id"),
        Index("ix_jobs_together", "together"),
        Index("ix_jobs_tenant_id_created_at", "tenant_id", "created_at"),
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state_known"),
    )
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    kind: Mapped[str] = mapped_column(String(16), default="train", server_default="train")
    """train: what a batch was sent for | replay: the same items once more | preview: nothing is applied"""
    batch_id: Mapped[str] = mapped_column(ForeignKey("feedback_batches.id"))
    seq: Mapped[int]
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    together: Mapped[str | None] = mapped_column(Id)
    """Jobs that share it are one training batch: fixed when the batch is first formed, so that a retry is the same."""
    seed: Mapped[int | None]
    """Of its run; None: the batch's own, else the sequence number."""
    state: Mapped[str] = mapped_column(String(16), default="queued")
    attempts: Mapped[int] = mapped_column(default=0)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id"))
    """The newest run that took this job."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    version_n: Mapped[int | None]
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), deferred=True)
    """Of a preview. Holds pieces of the answer's text, up to half a megabyte: read where it is asked for."""
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
    """running | committed | answered (a preview) | failed | released | lost | cancelled | superseded"""
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]


class Step(Base):
    __tablename__ = "run_steps"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    metrics: Mapped[dict[str, Any]]


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


class Turn(Base):
    """When a tenant last had a turn at a base model. Only claims write it, so it is never part of a deadlock."""

    __tablename__ = "turns"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(256), primary_key=True)
    served_at: Mapped[float]


class Event(Base):
    """What happened to a job or version, written in the transaction that did it. See `service.store.events`."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_id_n", "job_id", "n"),)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True)
    """1, 2, 3 ... per adapter, in the order of commits, without gaps."""
    type: Mapped[str] = mapped_column(String(32))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    version_n: Mapped[int | None]
    data: Mapped[dict[str, Any]]
    """Small facts, never text of users."""
    created_at: Mapped[float]


class Leader(Base):
    """Who has an office at present, under which fencing token."""

    __tablename__ = "leaders"
    office: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(Id)
    token: Mapped[int]
    until: Mapped[float]


class ServiceProcess(Base):
    """A running service and the versions that it may answer with at any moment."""

    __tablename__ = "service_processes"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    holds: Mapped[list[str]]
    asked: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Those that were asked for within the grace time of retention; NULL: it has not run for so long."""
    until: Mapped[float]
    """After this it counts as gone."""
