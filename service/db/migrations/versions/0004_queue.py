"""queue: training batches, turns, dead letters, pauses, events, election

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FAILED = sa.text("state = 'failed'")


def upgrade() -> None:
    for column in (
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("waits_since", sa.Double(), nullable=False, server_default="0"),
        sa.Column("paused_at", sa.Double(), nullable=True),
        sa.Column("blocked_by", sa.String(length=64), nullable=True),
        sa.Column("on_failure", sa.String(length=8), nullable=False, server_default="skip"),
        sa.Column("events_n", sa.Integer(), nullable=False, server_default="0"),
    ):
        op.add_column("adapters", column)
    _jobs()
    op.create_table(
        "turns",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("served_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_turns_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "base_model", name=op.f("pk_turns")),
    )
    op.create_table(
        "events",
        sa.Column("adapter_id", sa.String(length=64), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("version_n", sa.Integer(), nullable=True),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_events_adapter_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.PrimaryKeyConstraint("adapter_id", "n", name=op.f("pk_events")),
    )
    op.create_index("ix_events_job_id_n", "events", ["job_id", "n"])
    op.create_table(
        "leaders",
        sa.Column("office", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("office", name=op.f("pk_leaders")),
    )
    op.create_table(
        "service_processes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("holds", sa.JSON(), nullable=False),
        sa.Column("asked", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service_processes")),
    )


def _jobs() -> None:
    """A batch may have several jobs from now on: SQLite drops the constraint by building the table anew."""
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_constraint(op.f("uq_jobs_batch_id"), type_="unique")
        batch_op.add_column(sa.Column("kind", sa.String(length=16), nullable=False, server_default="train"))
        batch_op.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("together", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("seed", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("result", sa.JSON(none_as_null=True), nullable=True))
    op.create_index("ix_jobs_failed", "jobs", ["tenant_id", "created_at"], sqlite_where=FAILED, postgresql_where=FAILED)
    op.create_index("ix_jobs_batch_id", "jobs", ["batch_id"])
    op.create_index("ix_jobs_together", "jobs", ["together"])


def downgrade() -> None:
    for table in ("service_processes", "leaders", "events", "turns"):
        op.drop_table(table)
    for index in ("ix_jobs_together", "ix_jobs_batch_id", "ix_jobs_failed"):
        op.drop_index(index, "jobs")
    op.execute("DELETE FROM jobs WHERE kind != 'train'")
    with op.batch_alter_table("jobs") as batch_op:
        for column in ("result", "seed", "together", "priority", "kind"):
            batch_op.drop_column(column)
        batch_op.create_unique_constraint(op.f("uq_jobs_batch_id"), ["batch_id"])
    with op.batch_alter_table("adapters") as batch_op:
        for column in ("events_n", "on_failure", "blocked_by", "paused_at", "waits_since", "priority"):
            batch_op.drop_column(column)
