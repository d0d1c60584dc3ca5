"""Alembic's entry: the engine comes from service.db.migrate."""

from __future__ import annotations

from alembic import context

from service.db.tables import Base

engine = context.config.attributes["engine"]
with engine.connect().execution_options(begin="IMMEDIATE") as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7290331)")
        context.run_migrations()
    connection.commit()
