"""Alembic's entry: the engine comes from service.db.migrate."""

from __future__ import annotations

from alembic import context
from sqlalchemy.engine import Connection

from service.db.tables import Base

engine = context.config.attributes["engine"]


def foreign_keys(connection: Connection, state: str) -> None:
    """SQLite builds some tables anew, and must not take the old one's end for the end of its rows. Outside of any
    transaction, where alone it has an effect."""
    if connection.dialect.name == "sqlite":
        connection.connection.cursor().execute(f"PRAGMA foreign_keys={state}")


def run(connection: Connection) -> None:
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7290331)")
        context.run_migrations()
        if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise RuntimeError("the migration would leave rows that refer to nothing: nothing was changed")
    connection.commit()


with engine.connect().execution_options(begin="IMMEDIATE") as connection:
    foreign_keys(connection, "OFF")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        transaction_per_migration=False,
    )
    try:
        run(connection)
    finally:
        connection.rollback()
        foreign_keys(connection, "ON")
