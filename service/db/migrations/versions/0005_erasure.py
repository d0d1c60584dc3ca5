"""erasure: what was erased, what had learnt from it, and whose it was

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COLUMNS: tuple[tuple[str, str, sa.types.TypeEngine[Any]], ...] = (
    ("adapters", "held_until_seq", sa.Integer()),
    ("rollouts", "person", sa.String(length=64)),
    ("feedback_items", "person", sa.String(length=64)),
    ("feedback_items", "erased_at", sa.Double()),
    ("feedback_items", "erased_by", sa.String(length=16)),
    ("versions", "tainted_at", sa.Double()),
    ("versions", "retired_at", sa.Double()),
)
INDICES = (
    ("ix_rollouts_tenant_id_person", "rollouts", ["tenant_id", "person"]),
    ("ix_rollouts_created_at", "rollouts", ["created_at"]),
    ("ix_feedback_batches_created_at", "feedback_batches", ["created_at"]),
    ("ix_feedback_items_rollout_id", "feedback_items", ["rollout_id"]),
    ("ix_feedback_items_person", "feedback_items", ["person"]),
)


def upgrade() -> None:
    for table, name, kind in COLUMNS:
        op.add_column(table, sa.Column(name, kind, nullable=True))
    for name, table, columns in INDICES:
        op.create_index(name, table, columns)
    op.create_table(
        "chores",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("wanted_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chores")),
    )


def downgrade() -> None:
    op.drop_table("chores")
    for name, table, _ in INDICES:
        op.drop_index(name, table)
    for table, name, _ in reversed(COLUMNS):
        with op.batch_alter_table(table) as batch_op:
            batch_op.drop_column(name)
