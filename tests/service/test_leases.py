"""The lease protocol over HTTP: strict order, retries, and what a lease says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from api_schemas.worker import Lease
from service.context import Context
from tests.service import peft_files
from tests.service.asgi import Connection, running
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Stack, error_of
from tests.service.lease_calls import call, expire, lease_again


def test_jobs_of_one_adapter_run_in_order_and_one_at_a_time(helper: Stack) -> None:
    for remark in ("one", "two", "three"):
        helper.alice.feedback(remark)
    for n, remark in enumerate(("one", "two", "three")):
        lease = helper.worker.must_lease()
        assert [i.feedback for i in lease.items] == [remark]
        assert (lease.parent.version if lease.parent else 0) == n
        assert lease.standing_feedback == ["one", "two", "three"][:n]
        assert helper.worker.lease() is None
        helper.worker.train(lease)
    jobs = helper.alice.ok("GET", "/v1/jobs")["data"]
    assert [(j["sequence"], j["version"]) for j in jobs] == [(3, 3), (2, 2), (1, 1)]
    assert helper.alice.adapter()["queued_jobs"] == 0


def test_two_adapters_are_leased_at_once_and_the_older_job_first(helper: Stack) -> None:
    helper.alice.create("second")
    helper.alice.feedback("a", adapter="second")
    helper.alice.feedback("b", adapter="helper")
    first, other = helper.worker.must_lease(), helper.worker.must_lease()
    assert (first.adapter, other.adapter) == ("second", "helper")
    assert helper.worker.lease() is None


def test_the_lease_says_what_the_engine_recorded(helper: Stack) -> None:
    answer = helper.alice.chat(content="one two")
    items = [{"completion_id": answer["id"], "feedback": "x", "demonstration": "better", "standing": False}]
    helper.alice.ok("POST", "/v1/feedback", {"items": items})
    helper.alice.feedback("from elsewhere")
    item = helper.worker.must_lease().items[0]
    assert item.prompt_token_ids == [1, 3, 3]
    assert item.response_token_ids == [100, 101, 102]
    assert item.behaviour_logprobs == [-0.25, -0.5, -0.75]
    assert (item.version, item.demonstration, item.standing) == (0, "better", False)
    helper.worker.train(Lease.model_validate(lease_again(helper)))
    text = helper.worker.must_lease().items[0]
    assert (text.prompt_token_ids, text.response_token_ids, text.behaviour_logprobs, text.version) == (None,) * 4


def test_a_worker_of_another_base_gets_nothing(helper: Stack) -> None:
    helper.alice.feedback()
    assert helper.worker.lease(base="other/base") is None


def test_a_lease_ends_when_it_says(helper: Stack) -> None:
    helper.alice.feedback()
    before = helper.now()
    seconds = helper.worker.must_lease().lease_seconds
    until = helper.rows("SELECT lease_until FROM adapters")[0]["lease_until"]
    assert before + seconds <= until <= helper.now() + seconds


def test_a_heartbeat_extends_the_lease_and_reports(helper: Stack) -> None:
    sent = helper.alice.feedback()
    lease = helper.worker.must_lease()
    helper.sql("UPDATE adapters SET lease_until = 1.0")
    beat = {"progress": {"phase": "training", "step": 1, "steps": 4}, "metrics": [{"step": 1, "loss": 0.7}]}
    seconds = helper.context.settings.lease_seconds
    for _ in range(2):
        before = helper.now()
        answer = helper.worker.call(lease, "heartbeat", **beat)
        assert answer.json()["lease_seconds"] == seconds
        until = helper.rows("SELECT lease_until FROM adapters")[0]["lease_until"]
        assert before + seconds <= until <= helper.now() + seconds
    job = helper.alice.job(sent["job_id"])
    assert job["progress"] == {"phase": "training", "step": 1, "steps": 4}
    assert [m["step"] for m in job["metrics"]] == [1]
    bad = [{"metrics": [{"step": -1, "loss": 1}]}, {"metrics": [{"step": 2**40, "loss": 1}]}, {"extra": 1}]
    for fields in bad:
        assert helper.worker.call(lease, "heartbeat", **fields).status_code == 422


def test_a_failure_is_tried_again_after_a_pause_then_final(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(retry_backoff=600.0, max_attempts=3)
    stack.alice.create()
    first, second = stack.alice.feedback("bad"), stack.alice.feedback("good")
    for attempt, pause in ((1, 600), (2, 1200)):
        before = stack.now()
        assert stack.worker.fail(stack.worker.must_lease()).status_code == 204
        after = stack.now()
        job = stack.alice.job(first["job_id"])
        assert (job["status"], job["attempts"], job["error"]["code"]) == ("queued", attempt, "out_of_memory")
        run_after = stack.rows("SELECT run_after FROM adapters")[0]["run_after"]
        assert before + pause / 2 <= run_after <= after + pause, "with jitter"
        assert stack.worker.lease() is None, "the pause holds the adapter"
        stack.sql("UPDATE adapters SET run_after = 0")
    assert stack.worker.fail(stack.worker.must_lease()).status_code == 204
    job = stack.alice.job(first["job_id"])
    assert (job["status"], job["attempts"]) == ("failed", 3)
    assert job["finished_at"] is not None
    assert stack.alice.ok("GET", f"/v1/feedback/{first['id']}")["status"] == "failed"
    assert stack.worker.train() == 1
    assert stack.alice.job(second["job_id"])["version"] == 1


def test_a_failure_that_no_retry_helps_is_final_at_once(helper: Stack) -> None:
    sent = helper.alice.feedback()
    helper.worker.fail(helper.worker.must_lease(), retryable=False, code="context_too_long")
    job = helper.alice.job(sent["job_id"])
    assert (job["status"], job["error"]) == ("failed", {"code": "context_too_long", "message": "no"})
    assert helper.alice.adapter()["queued_jobs"] == 0


def test_a_worker_cannot_fill_the_database_with_one_error(helper: Stack) -> None:
    sent = helper.alice.feedback()
    error = {"code": "c" * 1000, "message": "m" * 100_000}
    assert helper.worker.call(helper.worker.must_lease(), "fail", error=error, retryable=False).status_code == 204
    kept = helper.alice.job(sent["job_id"])["error"]
    assert (len(kept["code"]), len(kept["message"])) == (64, 4000)


def test_a_released_lease_counts_no_attempt(helper: Stack) -> None:
    sent = helper.alice.feedback()
    lease = helper.worker.must_lease()
    assert call(helper.worker, lease, "release") == 204
    job = helper.alice.job(sent["job_id"])
    assert (job["status"], job["attempts"]) == ("queued", 0)
    again = helper.worker.must_lease()
    assert (again.token, again.seed) == (lease.token + 1, lease.seed)


@pytest.mark.parametrize("given", [None, 77])
def test_the_seed_follows_the_job(helper: Stack, given: int | None) -> None:
    training = {"seed": given} if given is not None else {}
    helper.alice.feedback("one", training=training)
    helper.alice.feedback("two", training=training)
    seeds = []
    for _ in range(3):
        seeds.append(helper.worker.must_lease().seed)
        expire(helper)
    helper.worker.train()
    seeds.append(helper.worker.must_lease().seed)
    assert seeds == ([77] * 4 if given is not None else [1, 1, 1, 2])
    assert helper.alice.ok("GET", "/v1/adapters/helper/versions/1")["seed"] == seeds[0]


def test_cancelling_a_queued_job_lets_the_next_one_run(helper: Stack) -> None:
    first, second = helper.alice.feedback("one"), helper.alice.feedback("two")
    for _ in range(2):  # again is harmless
        assert helper.alice.ok("POST", f"/v1/jobs/{first['job_id']}/cancel")["status"] == "cancelled"
    assert helper.alice.adapter()["queued_jobs"] == 1
    assert [i.feedback for i in helper.worker.must_lease().items] == ["two"]
    helper.worker.train(Lease.model_validate(lease_again(helper)))
    error_of(helper.alice.post(f"/v1/jobs/{second['job_id']}/cancel"), 409, "job_ended")


def test_a_waiting_worker_hears_of_new_work(helper: Stack) -> None:
    leases: list[Lease | None] = []
    waiting = threading.Thread(target=lambda: leases.append(helper.worker.lease(wait_seconds=20)))
    waiting.start()
    helper.alice.feedback("now")
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert leases[0] is not None
    assert leases[0].items[0].feedback == "now"


def test_a_batch_can_set_its_own_training(helper: Stack) -> None:
    helper.alice.create("tuned", training={"steps": 7, "alpha": 0.25})
    helper.alice.feedback(adapter="tuned")
    helper.alice.feedback(adapter="tuned", training={"steps": 2})
    helper.alice.feedback(adapter="tuned", training={"preset": "lasgroup"})
    seen = []
    for _ in range(3):
        lease = helper.worker.must_lease()
        seen.append((lease.training.preset, lease.training.steps, lease.training.alpha))
        helper.worker.train(lease)
    assert seen == [("default", 7, 0.25), ("default", 2, 0.25), ("lasgroup", 1, 0.5)]


@pytest.mark.anyio
async def test_work_that_comes_after_a_waiting_worker_has_died_is_not_leased_to_it(
    stack: Stack, make_context: Callable[..., tuple[Context, FakeEngine]]
) -> None:
    """Else the adapter would stand still until that lease expires."""
    context, _ = make_context(stack.engine)
    stack.alice.create()
    body = {"worker_id": "dying", "base_model": peft_files.BASE, "wait_seconds": 20.0}
    async with running(context, worker=True) as (app, key):
        connection = Connection(app, key, "/worker/v1/leases", body)
        while not stack.count("workers"):  # it has looked once, in vain, and waits
            await asyncio.sleep(0)
        await asyncio.to_thread(stack.alice.feedback)
        hanging_up = asyncio.create_task(connection.hang_up())
        await asyncio.sleep(0)
        context.work.ring()
        await hanging_up
    assert stack.count("runs") == 0
    assert stack.worker.lease() is not None
