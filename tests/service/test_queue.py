"""The queue's rules over HTTP: what is trained together, lost leases, dead letters, pauses, and the outbox."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest

from api_schemas.worker import Lease
from service.store import retries
from tests.service.harness import Json, Stack, batch, error_of
from tests.service.lease_calls import call, expire

MakeStack = Callable[..., Stack]


def remarks(lease: Lease) -> list[str]:
    return [item.feedback for item in lease.items]


def send(stack: Stack, *remarks: str, **fields: object) -> list[str]:
    """A batch for each remark; the ids of their jobs."""
    return [stack.alice.feedback(r, **fields)["job_id"] for r in remarks]


def states(stack: Stack, jobs: list[str]) -> list[tuple[str, int]]:
    return [(j["status"], j["attempts"]) for j in map(stack.alice.job, jobs)]


@pytest.fixture
def joining(make_stack: MakeStack) -> Stack:
    stack = make_stack(coalesce_items=4, max_attempts=3)
    stack.alice.create()
    return stack


def test_what_waits_is_trained_together_in_order_up_to_the_limit(joining: Stack) -> None:
    sent = [joining.alice.ok("POST", "/v1/feedback", batch(*part)) for part in (["a"], ["b", "c"], ["d"], ["e"])]
    lease = joining.worker.must_lease()
    assert remarks(lease) == ["a", "b", "c", "d"]
    assert lease.batch_ids == [b["id"] for b in sent[:3]]
    assert joining.worker.lease() is None, "the fifth waits for its adapter"
    assert joining.worker.train(lease) == 1
    assert [joining.alice.job(b["job_id"])["version"] for b in sent] == [1, 1, 1, None]
    version = joining.alice.ok("GET", "/v1/adapters/helper/versions/1")
    assert version["batch_ids"] == lease.batch_ids
    assert version["feedback_ids"] == [i.id for i in lease.items]
    assert joining.count("applications") == 3
    assert joining.alice.adapter()["queued_jobs"] == 1
    assert remarks(joining.worker.must_lease()) == ["e"]


def test_a_batch_above_the_limit_is_trained_alone(joining: Stack) -> None:
    joining.alice.ok("POST", "/v1/feedback", batch(*"abcdef"))
    send(joining, "g")
    assert remarks(joining.worker.must_lease()) == list("abcdef")


def test_other_settings_end_the_batch_and_keep_the_order(joining: Stack) -> None:
    send(joining, "a")
    send(joining, "b", training={"steps": 2})
    send(joining, "c", "d")
    seen = []
    for _ in range(3):
        lease = joining.worker.must_lease()
        seen.append((remarks(lease), lease.training.steps))
        joining.worker.train(lease)
    assert seen == [(["a"], 8), (["b"], 2), (["c", "d"], 8)]


def test_a_batch_is_never_formed_anew_after_a_crash(joining: Stack) -> None:
    send(joining, "a", "b")
    first = joining.worker.must_lease()
    send(joining, "c")
    expire(joining)
    again = joining.worker.must_lease()
    assert (remarks(again), again.seed) == (remarks(first), first.seed) == (["a", "b"], 1)
    call(joining.worker, again, "release")
    assert remarks(joining.worker.must_lease()) == ["a", "b"]


def test_a_batch_stays_as_it_was_formed_when_the_limit_changes(make_stack: MakeStack) -> None:
    before = make_stack(coalesce_items=4)
    before.alice.create()
    send(before, "a", "b", "c")
    assert remarks(before.worker.must_lease()) == ["a", "b", "c"]
    expire(before)
    after = make_stack(coalesce_items=1)
    assert remarks(after.worker.must_lease()) == ["a", "b", "c"]


@pytest.mark.parametrize("retryable", [True, False])
def test_jobs_that_failed_together_are_tried_alone(joining: Stack, retryable: bool) -> None:
    """So one bad item costs nobody else anything."""
    jobs = send(joining, "a", "bad", "c")
    joining.worker.fail(joining.worker.must_lease(), retryable=retryable)
    assert states(joining, jobs) == [("queued", 1)] * 3
    for remark in ("a", "bad", "c"):
        lease = joining.worker.must_lease()
        assert remarks(lease) == [remark]
        if remark == "bad":
            joining.worker.fail(lease, retryable=False, code="bad_item")
        else:
            joining.worker.train(lease)
    assert states(joining, jobs) == [("succeeded", 1), ("failed", 2), ("succeeded", 1)]


def test_a_host_that_a_job_kills_is_lost_so_often_and_no_more(joining: Stack) -> None:
    jobs = send(joining, "killer")
    for attempt in range(3):
        assert remarks(joining.worker.must_lease()) == ["killer"]
        assert states(joining, jobs) == [("running", attempt)]
        expire(joining)
    assert joining.worker.lease() is None
    dead = joining.alice.job(jobs[0])
    assert (dead["status"], dead["attempts"], dead["error"]["code"]) == ("failed", 3, "worker_lost")
    assert "worker-1" in dead["error"]["message"]
    assert [r["state"] for r in joining.rows("SELECT state FROM runs")] == ["lost"] * 3
    assert joining.alice.adapter()["queued_jobs"] == 0


def test_jobs_that_lost_their_workers_together_are_each_tried_alone_at_last(joining: Stack) -> None:
    jobs = send(joining, "a", "killer", "c")
    for _ in range(3):
        assert remarks(joining.worker.must_lease()) == ["a", "killer", "c"]
        expire(joining)
    assert joining.worker.train() == 1
    assert remarks(joining.worker.must_lease()) == ["killer"]
    expire(joining)
    lease = joining.worker.must_lease()
    assert remarks(lease) == ["c"], "in the same call: what is dead holds nobody up"
    joining.worker.train(lease)
    assert states(joining, jobs) == [("succeeded", 2), ("failed", 3), ("succeeded", 2)]


def test_cancelling_one_of_a_running_batch_leaves_the_others_together(joining: Stack) -> None:
    jobs = send(joining, "a", "b", "c")
    lease = joining.worker.must_lease()
    joining.alice.ok("POST", f"/v1/jobs/{jobs[1]}/cancel")
    assert call(joining.worker, lease, "commit") == 409
    send(joining, "d")
    assert remarks(joining.worker.must_lease()) == ["a", "c"]


def test_dead_letters_are_listed_and_tried_again_in_their_old_place(helper: Stack) -> None:
    jobs = send(helper, "one", "two")
    helper.worker.fail(helper.worker.must_lease(), retryable=False, code="bad_item")
    found = helper.alice.ok("GET", "/v1/jobs?status=failed")["data"]
    assert [(j["id"], j["error"]["code"]) for j in found] == [(jobs[0], "bad_item")]
    again = helper.alice.ok("POST", f"/v1/jobs/{jobs[0]}/requeue")
    assert (again["status"], again["attempts"], again["sequence"], again["finished_at"]) == ("queued", 0, 1, None)
    error_of(helper.alice.post(f"/v1/jobs/{jobs[0]}/requeue"), 409, "job_not_failed")
    assert helper.alice.adapter()["queued_jobs"] == 2
    assert remarks(helper.worker.must_lease()) == ["one"]


def test_what_was_overtaken_is_tried_again_at_the_end(helper: Stack) -> None:
    jobs = send(helper, "one", "two", "three")
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    running = helper.worker.must_lease()
    assert remarks(running) == ["two"]
    assert helper.alice.ok("POST", f"/v1/jobs/{jobs[0]}/requeue")["sequence"] == 4
    helper.worker.train(running)
    assert [remarks(lease) for lease in (trained(helper), trained(helper))] == [["three"], ["one"]]


def trained(stack: Stack) -> Lease:
    """The next lease, trained. Its version is served before the next claim: while the publisher holds the adapter's
    row to move the alias, a claim on PostgreSQL takes another adapter (test_postgres.py)."""
    lease = stack.worker.must_lease()
    stack.worker.train(lease)
    stack.converge()
    return lease


def test_a_job_of_a_rejected_version_can_be_tried_again(helper: Stack) -> None:
    [job] = send(helper, "one")
    helper.engine.refused[helper.served(1)] = 500
    helper.worker.train()
    helper.converge()
    assert helper.alice.job(job)["status"] == "failed"
    helper.alice.ok("POST", f"/v1/jobs/{job}/requeue")
    assert helper.worker.train() == 2
    helper.converge()
    found = helper.alice.job(job)
    assert (found["status"], found["version"], found["published"], found["error"]) == ("succeeded", 2, True, None)


def test_nothing_of_a_deleted_adapter_is_tried_again(helper: Stack) -> None:
    [job] = send(helper, "one")
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    error_of(helper.alice.post(f"/v1/jobs/{job}/requeue"), 404, "adapter_not_found")


def blocked(stack: Stack) -> list[str]:
    """An adapter that stands still after its first of two jobs has failed."""
    stack.alice.create("strict", on_failure="block")
    jobs = send(stack, "one", "two", adapter="strict")
    stack.worker.fail(stack.worker.must_lease(), retryable=False)
    assert stack.alice.adapter("strict")["blocked_by"] == jobs[0]
    assert stack.worker.lease() is None
    return jobs


def test_an_adapter_may_stand_still_until_the_job_is_tried_again(stack: Stack) -> None:
    jobs = blocked(stack)
    stack.alice.ok("POST", f"/v1/jobs/{jobs[0]}/requeue")
    assert stack.alice.adapter("strict")["blocked_by"] is None
    assert [remarks(trained(stack)), remarks(trained(stack))] == [["one"], ["two"]]


def test_or_until_somebody_resumes_past_it(stack: Stack) -> None:
    blocked(stack)
    assert stack.alice.ok("POST", "/v1/adapters/strict/resume")["blocked_by"] is None
    assert remarks(trained(stack)) == ["two"]


def test_what_follows_a_failure_can_be_changed(helper: Stack) -> None:
    """For jobs that fail afterwards: who is blocked stays so."""
    assert helper.alice.ok("PATCH", "/v1/adapters/helper", {"on_failure": "block"})["on_failure"] == "block"
    first, *_ = send(helper, "one", "two", "three")
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    assert helper.worker.lease() is None
    found = helper.alice.ok("PATCH", "/v1/adapters/helper", {"on_failure": "skip"})
    assert (found["on_failure"], found["blocked_by"]) == ("skip", first)
    assert helper.worker.lease() is None
    helper.alice.ok("POST", "/v1/adapters/helper/resume")
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    assert remarks(trained(helper)) == ["three"]


def test_a_change_of_an_adapter_is_checked(helper: Stack) -> None:
    change = partial(helper.alice.request, "PATCH", "/v1/adapters/helper")
    error_of(change(json={"on_failure": "stop"}), 422, "invalid_parameter")
    error_of(change(json={}), 422, "missing_parameter")
    error_of(change(json={"on_failure": "skip", "name": "x"}), 422, "unknown_parameter")
    theirs = helper.bob.request("PATCH", "/v1/adapters/helper", json={"on_failure": "skip"})
    error_of(theirs, 404, "adapter_not_found")
    assert helper.alice.adapter()["on_failure"] == "skip"


def test_a_dead_letter_by_lost_workers_blocks_too(make_stack: MakeStack) -> None:
    stack = make_stack(max_attempts=1)
    stack.alice.create("strict", on_failure="block")
    send(stack, "one", "two", adapter="strict")
    stack.worker.must_lease()
    expire(stack)
    assert stack.worker.lease() is None
    assert stack.alice.adapter("strict")["blocked_by"] is not None


def test_a_pause_finishes_what_runs_and_holds_what_waits(helper: Stack) -> None:
    send(helper, "one", "two")
    lease = helper.worker.must_lease()
    for _ in range(2):  # again is harmless
        assert helper.alice.ok("POST", "/v1/adapters/helper/pause")["paused"] is True
    assert helper.worker.train(lease) == 1
    helper.converge()
    assert helper.alice.chat("helper")["model"] == "helper@v1"
    send(helper, "three")
    assert helper.worker.lease() is None
    for _ in range(2):
        assert helper.alice.ok("POST", "/v1/adapters/helper/resume")["paused"] is False
    assert remarks(trained(helper)) == ["two"]
    error_of(helper.alice.post("/v1/adapters/nobody/pause"), 404, "adapter_not_found")


def test_pauses_between_attempts_double_and_spread() -> None:
    for attempts, full in ((1, 4.0), (2, 8.0), (5, 64.0), (40, retries.MAX_PAUSE)):
        drawn = [retries.pause(4.0, attempts) for _ in range(200)]
        assert full / 2 <= min(drawn) < max(drawn) <= full
        assert len(set(drawn)) > 100


def turns(stack: Stack, most: int = 50) -> list[str]:
    """Adapters in the order of their turns until nothing waits."""
    order: list[str] = []
    while stack.rows("SELECT 1 FROM adapters WHERE open_jobs > 0"):
        assert len(order) < most
        order.append(trained(stack).adapter)
    return order


def test_tenants_take_turns_whatever_each_has_queued(stack: Stack) -> None:
    for name in ("a1", "a2", "a3"):
        stack.alice.create(name)
    stack.bob.create("b1")
    for _ in range(2):
        for name in ("a1", "a2", "a3"):
            stack.alice.feedback(adapter=name)
    for _ in range(3):
        stack.bob.feedback(adapter="b1")
    assert turns(stack) == ["a1", "b1", "a2", "b1", "a3", "b1", "a1", "a2", "a3"]


def test_a_busy_adapter_does_not_hold_up_another(stack: Stack) -> None:
    stack.alice.create("busy")
    stack.alice.create("quiet")
    for _ in range(4):
        stack.alice.feedback(adapter="busy")
    assert remarks(trained(stack)) == ["shorter"]
    stack.alice.feedback(adapter="quiet")
    stack.alice.feedback(adapter="busy")
    assert turns(stack) == ["busy", "quiet", "busy", "busy", "busy"]


def test_an_urgent_adapter_comes_first_and_lifts_what_waits_before_it(stack: Stack) -> None:
    for name in ("first", "urgent"):
        stack.alice.create(name)
        stack.alice.feedback(adapter=name)
    stack.alice.feedback("now", adapter="urgent", priority=9)
    stack.alice.feedback(adapter="urgent")
    assert turns(stack) == ["urgent", "urgent", "first", "urgent"]
    answer = stack.alice.post("/v1/feedback", batch("x") | {"priority": 10})
    assert error_of(answer, 422, "invalid_parameter")["param"] == "priority"


def test_priority_is_worth_some_waiting_and_no_more(make_stack: MakeStack) -> None:
    stack = make_stack(priority_seconds=60.0)
    for name, priority in (("low", 0), ("high", 2)):
        stack.alice.create(name)
        for _ in range(2):
            stack.alice.feedback(adapter=name, priority=priority)
    stack.sql("UPDATE adapters SET waits_since = waits_since - 119 WHERE name = 'low'")
    assert trained(stack).adapter == "high"
    stack.sql("UPDATE adapters SET waits_since = waits_since - 2 WHERE name = 'low'")
    assert trained(stack).adapter == "low"


def test_priority_gives_a_tenant_nothing_over_another(stack: Stack) -> None:
    for caller, name, priority in ((stack.bob, "theirs", 9), (stack.alice, "ours", 0)):
        caller.create(name)
        for _ in range(2):
            caller.feedback(adapter=name, priority=priority)
    assert sorted(turns(stack)[:2]) == ["ours", "theirs"]


def events(stack: Stack) -> list[Json]:
    rows = stack.rows("SELECT n, type, job_id, version_n FROM events ORDER BY adapter_id, n")
    return [dict(r) for r in rows]


def test_every_change_is_an_event_without_gaps(helper: Stack) -> None:
    one, two = send(helper, "one", "two")
    helper.worker.train()
    helper.converge()
    helper.worker.fail(helper.worker.must_lease())
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    helper.alice.ok("POST", f"/v1/jobs/{two}/requeue")
    helper.alice.ok("POST", f"/v1/jobs/{two}/cancel")
    found = events(helper)
    assert [e["n"] for e in found] == list(range(1, len(found) + 1))
    assert helper.rows("SELECT events_n FROM adapters")[0]["events_n"] == len(found)
    of_one = [e["type"] for e in found if e["job_id"] == one]
    of_two = [e["type"].removeprefix("job.") for e in found if e["job_id"] == two]
    assert of_one == ["job.queued", "job.running", "job.succeeded"]
    assert of_two == ["queued", "running", "queued", "running", "failed", "queued", "cancelled"]
    assert [(e["type"], e["version_n"]) for e in found if e["job_id"] is None] == [
        ("version.created", 1),
        ("version.published", 1),
    ]


def test_events_hold_no_text_of_users(helper: Stack) -> None:
    send(helper, "secret-remark")
    lease = helper.worker.must_lease()
    helper.worker.call(lease, "fail", error={"code": "x", "message": "about secret-remark"}, retryable=True)
    assert all("secret" not in str(r["data"]) for r in helper.rows("SELECT data FROM events"))


def test_an_event_and_its_change_are_one_transaction(helper: Stack) -> None:
    """A call that is refused leaves neither."""
    send(helper, "one")
    lease = helper.worker.must_lease()
    expire(helper)
    helper.worker.must_lease()
    before = events(helper)
    for verb in ("commit", "fail", "release", "heartbeat"):
        assert call(helper.worker, lease, verb) == 409
    assert events(helper) == before


def test_a_cleared_priority_falls_back(stack: Stack) -> None:
    stack.alice.create("x")
    for priority in (1, 7, 3):
        stack.alice.feedback(adapter="x", priority=priority)
    seen = []
    for _ in range(3):
        seen.append(stack.rows("SELECT priority FROM adapters")[0]["priority"])
        trained(stack)
    seen.append(stack.rows("SELECT priority FROM adapters")[0]["priority"])
    assert seen == [7, 7, 3, 0]
    assert all(a >= b for a, b in pairwise(seen))
