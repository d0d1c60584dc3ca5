"""The publisher's office: one process has it, and who lost it without noticing can change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from benchmarks.databases import KINDS, fresh
from service.db import migrate
from service.db.engine import Database
from service.store import election

OFFICE = "publisher"


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    with ExitStack() as stack:
        database = stack.enter_context(closing(Database(stack.enter_context(fresh(request.param)))))
        migrate.migrate(database)
        yield database


def stands(database: Database, process: str, seconds: float) -> int | None:
    with database.write() as s:
        return election.stand(s, OFFICE, process, seconds)


def checked(database: Database, token: int) -> None:
    with database.write() as s:
        election.check(s, OFFICE, token)


def test_who_lost_the_office_changes_nothing(database: Database) -> None:
    """As a publisher does that was frozen between its election and what it wants to write."""
    assert stands(database, "first", 0.0) == 1
    checked(database, 1)
    assert stands(database, "second", 60.0) == 2
    with pytest.raises(election.NotLeader):
        checked(database, 1)
    checked(database, 2)


def test_the_office_is_kept_until_it_is_free(database: Database) -> None:
    assert stands(database, "first", 60.0) == 1
    assert stands(database, "second", 60.0) is None
    assert stands(database, "first", 60.0) == 1
    with database.write() as s:
        election.resign(s, OFFICE, "second")  # not its own: nothing
        election.resign(s, OFFICE, "first")
    assert stands(database, "second", 60.0) == 2
    with pytest.raises(election.NotLeader):
        checked(database, 1)
