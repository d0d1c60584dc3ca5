"""Erasure, rebuild and expiry on a real PostgreSQL, and what its files hold afterwards."""

# ruff: noqa: F401, F403, F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.databases import admin
from tests.service.harness import Stack
from tests.service.test_erasure import (
    SECRET,
    TOKENS,
    fill,
    places_of,
    remark_on,
    secret_answer,
    test_a_run_that_trains_on_it_is_fenced_and_formed_again_without_it,
    test_everything_of_one_user_goes_however_it_was_said_whose_it_is,
)
from tests.service.test_expiry import *
from tests.service.test_postgres import database_url, server, template
from tests.service.test_rebuild import *

pytestmark = pytest.mark.slow


def places(root: Path) -> list[str]:
    """Files of the server that hold the secret words or tokens, its log of changes (WAL) left out."""
    words = [SECRET, f"{TOKENS[0]}, {TOKENS[1]}", f"{TOKENS[7]}, {TOKENS[8]}"]
    return [p for w in words for p in places_of(w, root) if "/pg_wal/" not in p]


def test_the_tables_files_hold_nothing_of_what_was_erased(helper: Stack, server: Any) -> None:
    data = Path(server.pgdata)
    fill(helper, 20)
    sent = remark_on(helper, secret_answer(helper), demonstration=f"{SECRET}, " * 600)
    fill(helper, 20)
    helper.learn()
    admin(server, "CHECKPOINT")
    assert places(data) != []
    assert helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")["scrubbed"]
    admin(server, "CHECKPOINT")
    assert places(data) == []


def test_a_transaction_in_the_way_leaves_the_rewriting_for_later(helper: Stack) -> None:
    sent = helper.alice.feedback(SECRET)
    database = helper.context.database
    database._busy_seconds = 0.2
    with database.engine.connect() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM feedback_items").all()
        assert not helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")["scrubbed"]
    assert helper.count("chores") == 1
    helper.converge()
    assert helper.count("chores") == 0
