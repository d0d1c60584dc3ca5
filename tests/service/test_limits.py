"""What is too much, too long or away: 413, 422, 429 and 503, and what was acknowledged stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.db.engine import sqlite
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Stack, batch, error_of


def test_too_long_for_the_window_says_both_lengths(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    stack.alice.create()
    stack.engine.window = 300
    stack.converge()  # the publisher hears the new window
    error = error_of(stack.alice.post("/v1/feedback", batch("word " * 400)), 422, "context_length_exceeded")
    assert "485 tokens" in error["message"]  # 400 + 3 + 2 words, 64 + 16 of template
    assert "300" in error["message"]
    assert error["param"] == "items.0"
    assert (stack.count("feedback_batches"), stack.count("jobs")) == (0, 0)
    # 200 words are more than 300 bytes: only a real count can admit them.
    assert stack.alice.post("/v1/feedback", batch("word " * 200)).status_code == 202


def test_feedback_is_taken_while_the_engine_is_away(helper: Stack) -> None:
    helper.converge()
    helper.engine.down = True
    assert helper.alice.post("/v1/feedback", batch("shorter")).status_code == 202


def test_a_window_that_was_never_known_is_503_not_a_guess(make_stack: Callable[..., Stack]) -> None:
    engine = FakeEngine("tiny/base")
    engine.down = True
    stack = make_stack(engine)
    stack.alice.create()
    answer = stack.alice.post("/v1/feedback", batch("shorter"))
    error_of(answer, 503, "engine_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert stack.count("jobs") == 0


def test_over_quota_is_429_with_retry_after(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(max_queued_jobs=2, max_adapters=2)
    stack.alice.create()
    for remark in ("a", "b"):
        stack.alice.feedback(remark)
    answer = stack.alice.post("/v1/feedback", batch("c"))
    error_of(answer, 429, "over_quota")
    assert int(answer.headers["retry-after"]) > 0
    assert stack.count("jobs") == 2
    stack.worker.train()
    stack.alice.feedback("c")
    stack.alice.create("second")
    answer = stack.alice.post("/v1/adapters", {"name": "third"})
    error_of(answer, 429, "over_quota")
    assert int(answer.headers["retry-after"]) > 0
    assert stack.bob.post("/v1/adapters", {"name": "third"}).status_code == 201


@pytest.mark.parametrize("fault", ["locked", "overwritten", "gone"])
def test_a_dead_database_is_503_and_what_was_acknowledged_stays(make_stack: Callable[..., Stack], fault: str) -> None:
    stack = make_stack(database_busy_seconds=0.05)
    stack.alice.create()
    kept = stack.alice.feedback("before")
    path = stack.context.settings.data_dir / "perennial.db"
    heal = break_database(path, fault)
    calls = [(stack.alice, "POST", "/v1/feedback", batch("during"))]
    calls += [(stack.worker.caller, "POST", "/worker/v1/leases", {"worker_id": "w", "base_model": "b"})]
    if fault != "locked":  # a writer does not keep readers out
        calls += [(stack.alice, "GET", "/v1/jobs", {})]
    for caller, method, route, body in calls:
        answer = caller.request(method, route, json=body)
        error_of(answer, 503, "database_unavailable")
        assert int(answer.headers["retry-after"]) > 0
    assert stack.client.get("/healthz").status_code == 200
    heal()
    assert stack.alice.job(kept["job_id"])["status"] == "queued"
    assert stack.count("feedback_batches") == 1
    stack.alice.feedback("after")


def break_database(path: Path, fault: str) -> Callable[[], Any]:
    """Make the file unusable in earnest; the returned function puts it right again."""
    if fault == "locked":
        other = sqlite.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        return other.close
    files = [path, *(p for p in path.parent.glob("perennial.db-*"))]
    saved = {p: p.read_bytes() for p in files}
    for file in files:
        file.unlink()
    if fault == "overwritten":
        path.write_bytes(b"this is not a database " * 1000)
    else:
        path.mkdir()

    def heal() -> None:
        path.rmdir() if path.is_dir() else path.unlink()
        for file, content in saved.items():
            file.write_bytes(content)

    return heal


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_413(make_stack: Callable[..., Stack], chunked: bool) -> None:
    stack = make_stack(max_body_bytes=10_000)
    body = b'{"name": "x"' + b" " * 20_000 + b"}"  # good but for its size
    content: Any = (body[i : i + 4096] for i in range(0, len(body), 4096)) if chunked else body
    answer = stack.alice.request("POST", "/v1/adapters", content=content, headers={"content-type": "application/json"})
    error_of(answer, 413, "body_too_large")
    assert answer.headers["x-request-id"].startswith("req_")
    assert stack.count("adapters") == 0
