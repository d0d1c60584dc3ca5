"""A glance sees what is committed, at once; whatever is unusual goes the long way."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from service.db.engine import Database, sqlite
from service.db.glance import Glance, NotNow
from service.store import keys
from tests.service.harness import Stack, error_of

CHAT = {"model": "helper", "messages": [{"role": "user", "content": "who are you"}]}


def refused(glance: Glance) -> bool:
    try:
        glance.rows("SELECT 1 AS one", {})
    except NotNow:
        return True
    return False


def test_requests_are_answered_by_a_glance_alone(stack: Stack) -> None:
    """Without it the tests below would show nothing: both ways give the same."""
    stack.alice.create()
    asked = []
    stack.context.callers.submit = lambda key: asked.append(key)  # type: ignore[method-assign, assignment, return-value]
    assert stack.alice.post("/v1/chat/completions", CHAT).status_code == 200
    assert asked == []


def test_a_revoked_key_and_a_moved_alias_count_at_once(stack: Stack) -> None:
    stack.alice.create()
    for n in (1, 2, 3):
        stack.learn(f"lesson {n}")
        stack.converge()
        assert stack.alice.post("/v1/chat/completions", CHAT).json()["model"] == f"helper@v{n}"
    with stack.context.database.write() as s:
        key = s.execute(text("SELECT id FROM api_keys WHERE scopes LIKE '%chat%' ORDER BY created_at")).scalars()
        for one in list(key):
            keys.revoke(s, one)
    error_of(stack.alice.post("/v1/chat/completions", CHAT), 401, "invalid_api_key")


def test_what_the_long_way_says_is_said_after_a_glance_too(stack: Stack) -> None:
    stack.alice.create()
    said = [stack.alice.post("/v1/chat/completions", CHAT | {"model": m}) for m in ("helper@v9", "nobody", "helper")]
    stack.context.database.glance.close()
    again = [stack.alice.post("/v1/chat/completions", CHAT | {"model": m}) for m in ("helper@v9", "nobody", "helper")]
    assert [a.status_code for a in said] == [a.status_code for a in again] == [404, 404, 200]
    assert [a.json() for a in said[:2]] == [a.json() for a in again[:2]]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    for name, n in (("a", 1), ("b", 2)):
        with sqlite.connect(tmp_path / name) as connection:
            connection.execute("CREATE TABLE t (n)")
            connection.execute("INSERT INTO t VALUES (?)", (n,))
        connection.close()
    glance = Glance(str(tmp_path / "a"), sqlite)
    assert glance.rows("SELECT n FROM t", {}) == [{"n": 1}]
    (tmp_path / "b").rename(tmp_path / "a")
    assert glance.rows("SELECT n FROM t", {}) == [{"n": 2}]
    (tmp_path / "a").unlink()
    assert refused(glance)
    assert not (tmp_path / "a").exists(), "a look makes no file"


def test_nobody_waits_in_a_glance(tmp_path: Path) -> None:
    """Another journal mode, in which a writer shuts readers out."""
    path = tmp_path / "db"
    writer = sqlite.connect(path, isolation_level=None)
    writer.execute("CREATE TABLE t (n)")
    glance = Glance(str(path), sqlite)
    assert glance.rows("SELECT n FROM t", {}) == []
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(NotNow):
        glance.rows("SELECT n FROM t", {})
    writer.execute("COMMIT")
    assert glance.rows("SELECT n FROM t", {}) == []
    glance.close()
    writer.close()


def test_it_keeps_no_snapshot_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "db"
    writer = sqlite.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE t (n)")
    writer.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(9)])
    glance = Glance(str(path), sqlite)
    assert len(glance.rows("SELECT n FROM t", {})) == 2
    busy, *_ = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0, "a look that is over is in nobody's way"
    with pytest.raises(NotNow):
        glance.rows("DELETE FROM t", {})
    glance.close()
    writer.close()


def test_other_databases_are_read_the_long_way() -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")  # no connection is made before the first use
    assert refused(database.glance)
    database.close()
