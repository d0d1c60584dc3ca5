"""Prepared statements: what is given arrives as it was, in both databases, and errors are SQLAlchemy's."""

from __future__ import annotations

import json
import random

import pytest
from sqlalchemy import Dialect, FromClause, select
from sqlalchemy.exc import IntegrityError

from service.db.prepared import Prepared, Statement, inserted
from service.db.tables import Base, ServiceProcess
from tests.service.harness import Stack

C = Base.metadata.tables["service_processes"].c
INSERT = inserted(C.id, C.holds, C.asked, C.until)
TEXTS = ("plain", "ä\U0001f600\n\t\"'\\", "%s %(rows)s ? :rows", "{}", "null", "1", "\x01\x7f\u2028", "")


def _found(_: Dialect, wanted: FromClause) -> Statement:
    return select(C.id, C.until).where(C.id.in_(select(wanted.c.id))).order_by(C.until)


FOUND = Prepared(_found, C.id)


def test_any_text_number_and_list_arrives_as_it_was(stack: Stack) -> None:
    chance = random.Random(1)  # noqa: S311 - repeatable, not secret
    rows = [
        {"id": f"{n}{text}", "holds": json.dumps([text]), "asked": None if n % 2 else "[]", "until": until}
        for n, text in enumerate(TEXTS)
        for until in [5e9 + chance.random()]  # far ahead: the publisher clears away what is long past
    ]
    with stack.context.database.write() as s:
        INSERT.run(s.connection(), rows)
    with stack.context.database.read() as s:
        for row in rows:
            kept = s.get_one(ServiceProcess, row["id"])
            asked = None if row["asked"] is None else []
            assert (kept.holds, kept.asked, kept.until) == (json.loads(row["holds"]), asked, row["until"])
        wanted = [{"id": r["id"]} for r in rows[::2]] + [{"id": "x" * 300}, {"id": "nobody"}]
        found = FOUND.run(s.connection(), wanted)
    assert found == sorted(((r["id"], r["until"]) for r in rows[::2]), key=lambda r: r[1])


def test_an_error_is_sqlalchemys_and_holds_no_values(stack: Stack) -> None:
    row = {"id": "secret", "holds": "[]", "asked": None, "until": 0.0}
    with pytest.raises(IntegrityError) as raised, stack.context.database.write() as s:
        INSERT.run(s.connection(), [row, row])
    assert "secret" not in str(raised.value).split("DETAIL")[0]
    with stack.context.database.read() as s:
        assert s.get(ServiceProcess, "secret") is None
