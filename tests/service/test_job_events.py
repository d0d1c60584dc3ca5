"""A job's events as a stream: whole, in order, taken up where it broke off, ended with the job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from tests.service.asgi import Connection, running
from tests.service.harness import Json, Stack, error_of
from tests.service.lease_calls import expire

Event = tuple[str | None, str, Json]
"""(id, type, data)"""


def parsed(text: str) -> list[Event]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found


def events(stack: Stack, job: str, **headers: str) -> list[Event]:
    """Of a job that ends by itself."""
    answer = stack.alice.get(f"/v1/jobs/{job}/events", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith("retry: ")
    return parsed(answer.text)


def trained(stack: Stack) -> str:
    """A job whose first worker was lost after two steps and whose second one committed."""
    job = str(stack.alice.feedback()["job_id"])
    first = stack.worker.must_lease()
    stack.worker.call(first, "heartbeat", metrics=[{"step": n, "loss": 1.0 / n} for n in (1, 2)])
    expire(stack)
    second = stack.worker.must_lease()
    stack.worker.call(second, "heartbeat", metrics=[{"step": 1, "loss": 0.9}])
    stack.worker.train(second)
    return job


def test_the_whole_story_in_order(helper: Stack) -> None:
    job = trained(helper)
    found = events(helper, job)
    assert [(i, t) for i, t, _ in found] == [
        ("1", "job.queued"),
        ("2", "job.running"),
        ("2-1", "job.step"),
        ("2-2", "job.step"),
        ("3", "job.queued"),
        ("4", "job.running"),
        ("4-1", "job.step"),
        (found[-1][0], "job.succeeded"),
    ]
    assert found[0][2] == {
        "type": "job.queued", "adapter_id": helper.alice.adapter()["id"], "job_id": job,
        "data": {"why": "new", "attempts": 0}, "created_at": found[0][2]["created_at"],
    }  # fmt: skip
    assert found[3][2]["metrics"]["loss"] == 0.5
    assert found[-1][2]["version"] == 1


def test_it_is_taken_up_after_every_single_event(helper: Stack) -> None:
    job = trained(helper)
    whole = events(helper, job)
    for n, (position, _, _) in enumerate(whole[:-1]):
        assert position is not None
        assert events(helper, job, **{"last-event-id": position}) == whole[n + 1 :]


def test_after_its_end_a_browser_is_told_not_to_come_again(helper: Stack) -> None:
    job = trained(helper)
    last = events(helper, job)[-1][0]
    answer = helper.alice.get(f"/v1/jobs/{job}/events", headers={"last-event-id": str(last)})
    assert (answer.status_code, answer.text) == (204, "")


def test_bad_positions_and_other_tenants(helper: Stack) -> None:
    job = helper.alice.feedback()["job_id"]
    for position in ("x", "-1", "1-", "1-2-3", "9" * 11):
        answer = helper.alice.get(f"/v1/jobs/{job}/events", headers={"last-event-id": position})
        error_of(answer, 422, "invalid_parameter")
    error_of(helper.bob.get(f"/v1/jobs/{job}/events"), 404, "job_not_found")
    error_of(helper.alice.get("/v1/jobs/job_0/events"), 404, "job_not_found")


def test_a_cancelled_job_says_so(helper: Stack) -> None:
    job = helper.alice.feedback()["job_id"]
    helper.alice.ok("POST", f"/v1/jobs/{job}/cancel")
    assert [t for _, t, _ in events(helper, job)] == ["job.queued", "job.cancelled"]


class Watching:
    """A stream that is open on the test's own event loop."""

    def __init__(self, app: FastAPI, key: str, job: str, *, room: int = 0) -> None:
        self.connection = Connection(app, key, f"/v1/jobs/{job}/events", None, room=room, method="GET")

    async def next(self) -> Event | bytes:
        """The next event, or a comment as it is."""
        while True:
            message = await asyncio.wait_for(self.connection.sent.get(), 10)
            body: bytes = message.get("body", b"")
            if body.startswith(b":"):
                return body
            if found := parsed(body.decode()):
                return found[0]
            assert message["type"] == "http.response.start" or message.get("more_body") or not body


@pytest.mark.anyio
async def test_news_arrive_while_it_is_open_and_heartbeats_while_there_are_none(
    make_stack: Callable[..., Stack], make_context: Callable[..., Any]
) -> None:
    """What another process of the service writes arrives too: there are two on one database here."""
    stack = make_stack()
    stack.alice.create()
    job = stack.alice.feedback()["job_id"]
    context, _ = make_context(heartbeat_seconds=0.05)
    async with running(context) as (app, _key):
        watching = Watching(app, stack.alice.key, job)
        assert (await watching.next())[1] == "job.queued"
        assert await watching.next() == b": still there\n\n"
        lease = await asyncio.to_thread(stack.worker.must_lease)
        await asyncio.to_thread(stack.worker.call, lease, "heartbeat", progress={"phase": "training"})
        seen = []
        while "job.progress" not in seen:
            if isinstance(event := await watching.next(), tuple):
                seen.append(event[1])
        await asyncio.to_thread(stack.worker.train, lease)
        while seen[-1] != "job.succeeded":
            if isinstance(event := await watching.next(), tuple):
                seen.append(event[1])
        assert seen == ["job.running", "job.progress", "job.step", "job.succeeded"]
        await asyncio.wait_for(watching.connection.task, 10)


@pytest.mark.anyio
async def test_a_slow_reader_holds_no_connection_and_the_end_of_the_service_ends_it(
    make_stack: Callable[..., Stack], make_context: Callable[..., Any]
) -> None:
    stack = make_stack()
    stack.alice.create()
    job = stack.alice.feedback()["job_id"]
    context, _ = make_context()
    async with running(context) as (app, _key):
        slow = [Watching(app, stack.alice.key, job, room=1) for _ in range(30)]
        while not all(w.connection.sent.full() for w in slow):
            await asyncio.sleep(0)
        while context.database.engine.pool.checkedout():  # type: ignore[attr-defined]
            await asyncio.sleep(0)  # the publisher has one for a moment; a reader's would never come back
        context.stopping.set()
        for watching in slow:
            while not watching.connection.task.done():
                if watching.connection.sent.empty():
                    await asyncio.sleep(0)
                else:
                    watching.connection.sent.get_nowait()
