"""serving: canary, uploads and retention of versions

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("versions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("source", sa.String(length=16), nullable=False, server_default="training"))
        batch_op.add_column(sa.Column("canary", sa.JSON(none_as_null=True), nullable=True))
        batch_op.add_column(sa.Column("files_doomed_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("files_removed_at", sa.Double(), nullable=True))
    with op.batch_alter_table("versions", schema=None) as batch_op:
        batch_op.alter_column("source", existing_type=sa.String(length=16), server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("versions", schema=None) as batch_op:
        for column in ("files_removed_at", "files_doomed_at", "canary", "source"):
            batch_op.drop_column(column)
