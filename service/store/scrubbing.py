"""After an erasure the database's files are written anew: rows that are gone leave bytes behind.

What is to be done is a row, written in the erasing transaction, so a process that dies in between only delays it.
"""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.db.engine import Database, clock
from service.db.tables import Chore

CHORE = "scrub"
TABLES = ("feedback_items", "rollouts", "feedback_batches", "versions", "jobs", "runs")
"""Where texts of users were."""


def wanted(s: Session) -> None:
    """From this commit on a scrub is due."""
    s.merge(Chore(name=CHORE, wanted_at=clock(s)))


def due(s: Session) -> float | None:
    """Since when a scrub is due, Unix seconds."""
    return s.scalar(select(Chore.wanted_at).where(Chore.name == CHORE))


def scrub(database: Database) -> bool:
    """Write the files anew if that is due; True when nothing is left to do. Raises Unavailable: it is still due."""
    with database.read() as s:
        since = due(s)
    if since is None:
        return True
    database.rewrite(TABLES)
    with database.write() as s:  # unless something was erased meanwhile
        s.execute(delete(Chore).where(Chore.name == CHORE, Chore.wanted_at <= since))
        return due(s) is None
