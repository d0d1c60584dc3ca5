"""Schema changes: explicit, by `perennial migrate`; a service on another schema says so instead of guessing."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.db.engine import Database

MIGRATIONS = Path(__file__).parent / "migrations"


def config(database: Database) -> Config:
    """Alembic's configuration, bound to this database; there is no alembic.ini."""
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS))
    made.attributes["engine"] = database.engine
    return made


def migrate(database: Database) -> None:
    """Bring the schema to the newest revision. Harmless when it is there already."""
    command.upgrade(config(database), "head")


def pending(database: Database) -> bool:
    """True when the schema is not the one that this code expects."""
    with database.engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return found != ScriptDirectory.from_config(config(database)).get_current_head()
