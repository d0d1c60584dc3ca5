"""Old versions lose their files: never one that is needed, never before every engine has let go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.service.harness import Stack, error_of

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def keeping(make_stack: Callable[..., Stack]) -> Callable[..., Stack]:
    def make(keep: int | None, grace: float = 0.0) -> Stack:
        stack = make_stack(keep_versions=keep, retention_grace_seconds=grace)
        stack.alice.create()
        return stack

    return make


def kept(stack: Stack) -> list[int]:
    """Versions whose files are on disk."""
    rows = stack.rows("SELECT n, uri FROM versions ORDER BY n")
    return [r["n"] for r in rows if (stack.root / r["uri"]).is_dir()]


def told(stack: Stack) -> list[int]:
    """Versions that are said to have their files."""
    data = stack.alice.ok("GET", "/v1/adapters/helper/versions")["data"]
    return [v["version"] for v in data if v["files"] == "kept"]


def test_all_are_kept_by_default(keeping: Callable[..., Stack]) -> None:
    stack = keeping(None)
    for i in range(4):
        stack.learn(f"remark {i}")
    stack.converge()
    assert kept(stack) == told(stack) == [1, 2, 3, 4]


def test_the_newest_are_kept_and_the_heads_parent(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1)
    for i in range(5):
        stack.learn(f"remark {i}")
    stack.converge()
    assert kept(stack) == told(stack) == [4, 5]
    assert stack.alice.says("helper").endswith("-v5")


def test_a_removed_version_is_gone_for_every_use(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1)
    for i in range(3):
        stack.learn(f"remark {i}")
        if i == 0:
            assert stack.alice.get("/v1/adapters/helper/versions/1/download").status_code == 200
    stack.converge()
    for answer in (
        stack.alice.get("/v1/adapters/helper/versions/1/download"),
        stack.alice.post("/v1/adapters/helper/promote", {"version": 1}),
        stack.alice.post("/v1/chat/completions", {"model": "helper@v1", "messages": MESSAGES}),
    ):
        error_of(answer, 410, "version_removed")
    assert stack.alice.ok("GET", "/v1/adapters/helper/versions/1")["files"] == "removed"
    assert list(stack.context.settings.archives_root.iterdir()) == []


def test_what_was_rolled_back_to_is_kept(keeping: Callable[..., Stack]) -> None:
    stack = keeping(2)
    stack.learn("one")
    stack.learn("two")
    stack.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})
    stack.learn("three")
    stack.learn("four")
    stack.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 3})
    stack.learn("five")
    stack.converge()
    assert kept(stack) == [3, 4, 5], "3 is the parent of the head"


def test_nothing_goes_within_the_grace_time(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1, grace=3600.0)
    for i in range(4):
        stack.learn(f"remark {i}")
    stack.converge()
    assert kept(stack) == [1, 2, 3, 4]


def test_a_version_that_is_asked_for_stays(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1, grace=3600.0)
    for i in range(4):
        stack.learn(f"remark {i}")
    assert stack.alice.says("helper@v2").endswith("-v2")
    # The clock of the grace time, run ahead: for the rows and for this process, not for the request above.
    stack.sql("UPDATE versions SET created_at = created_at - 7200")
    retention = stack.context.publisher._retention
    retention._started -= 7200
    stack.converge()
    assert kept(stack) == [2, 3, 4]


def test_files_stay_while_an_engine_knows_the_version(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1)
    stack.learn("one")
    stack.engine.stuck_unloads = True
    for remark in ("two", "three", "four"):
        stack.learn(remark)
    stack.converge()
    assert 1 in kept(stack)
    assert next(iter(stack.engine.adapters)).endswith("-v1")
    stack.engine.stuck_unloads = False
    stack.converge()
    stack.converge()
    assert kept(stack) == [3, 4]


def test_a_kill_between_mark_and_removal_loses_nothing(keeping: Callable[..., Stack]) -> None:
    stack = keeping(1)
    for i in range(3):
        stack.learn(f"remark {i}")
    stack.sql("UPDATE versions SET files_doomed_at = 1.0, files_removed_at = NULL WHERE n = 1")
    (row,) = stack.rows("SELECT uri FROM versions WHERE n = 1")
    (stack.root / row["uri"] / "adapter").mkdir(parents=True, exist_ok=True)
    stack.converge()
    assert kept(stack) == [2, 3]
    assert stack.rows("SELECT files_removed_at IS NOT NULL AS gone FROM versions WHERE n = 1") == [{"gone": 1}]
