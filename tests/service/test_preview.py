"""Previews over HTTP: their place in the queue, their end, and that nothing is learnt from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from api_schemas.preview import MAX_PREVIEW_ITEMS
from api_schemas.worker import Lease
from service.store import expiry
from tests.service import peft_files
from tests.service.harness import Caller, Json, Stack, batch, error_of
from tests.service.lease_calls import call, expire, state

MakeStack = Callable[..., Stack]
PREVIEW = "/v1/feedback/preview"


def preview(caller: Caller, *remarks: str, **headers: str) -> Json:
    return caller.ok("POST", PREVIEW, batch(*(remarks or ("shorter",))), headers=headers)


def finding(lease: Lease) -> Json:
    """What a worker could have found out."""
    wanted = {"text": "a", "logprob": -0.1}
    token = {"text": "\ufffd", "bytes": [226, 156], "student": -3.0, "teacher": -0.5, "effect": 2.0, "instead": wanted}
    numbers = {"acts": True, "moved_share": 1.0, "mean_gap": 2.5, "largest_gap": 2.5, "expected_drift": 0.7}
    items = [
        {"id": i.id, **numbers, "response_tokens": 2, "tokens": [token], "tokens_left_out": 1} for i in lease.items
    ]
    totals = {"threshold": 0.5, "acting_share": 1.0, "moved_share": 1.0, "expected_drift": 0.7, "items": items}
    return {"version": lease.parent.version if lease.parent else 0} | totals


def answer(stack: Stack, lease: Lease) -> int:
    sent = stack.worker.call(lease, "result", preview=finding(lease))
    if sent.status_code == 409:
        assert error_of(sent, 409, "lease_lost")
    return sent.status_code


def kinds(stack: Stack, most: int = 10) -> list[str]:
    """Of the leases until there is no work, each brought to its end."""
    found = []
    while len(found) < most and (lease := stack.worker.lease()) is not None:
        found.append(lease.kind + "".join(f" {i.feedback}" for i in lease.items))
        if lease.kind == "preview":
            assert answer(stack, lease) == 204
        else:
            stack.worker.train(lease)
    return found


def test_a_preview_is_answered_and_nothing_is_learnt(helper: Stack) -> None:
    helper.learn("stands")
    before = helper.alice.adapter()
    sent = preview(helper.alice, "one", "two")
    assert (sent["kind"], sent["status"], sent["result"]) == ("preview", "queued", None)
    lease = helper.worker.must_lease()
    assert lease.kind == "preview"
    assert lease.parent is not None
    assert (lease.parent.version, lease.standing_feedback) == (1, ["stands"])
    assert [(i.feedback, i.standing) for i in lease.items] == [("one", False), ("two", False)]
    assert answer(helper, lease) == 204
    job = helper.alice.job(sent["id"])
    assert (job["status"], job["version"], job["published"]) == ("succeeded", None, False)
    assert job["result"]["version"] == 1
    assert [i["id"] for i in job["result"]["items"]] == [i.id for i in lease.items]
    assert job["result"]["items"][0]["tokens"][0]["bytes"] == [226, 156]
    assert helper.alice.adapter() == before
    helper.learn("after")
    version = helper.alice.ok("GET", "/v1/adapters/helper/versions/2")
    assert version["parent"] == 1
    assert version["standing_feedback"] == ["stands", "after"]
    assert job["batch_id"] not in version["batch_ids"]
    assert helper.count("applications") == 2


def test_the_result_is_the_tenant_s_alone_and_not_in_lists(helper: Stack) -> None:
    sent = preview(helper.alice)
    answer(helper, helper.worker.must_lease())
    error_of(helper.bob.get(f"/v1/jobs/{sent['id']}"), 404, "job_not_found")
    [listed] = helper.alice.ok("GET", "/v1/jobs")["data"]
    assert (listed["kind"], listed["result"]) == ("preview", None)
    assert helper.alice.job(sent["id"])["result"] is not None


def test_a_preview_goes_before_waiting_training_and_then_one_training_has_its_turn(helper: Stack) -> None:
    for remark in ("a", "b", "c"):
        helper.alice.feedback(remark)
    for remark in ("x", "y"):
        preview(helper.alice, remark)
    assert kinds(helper) == ["preview x", "train a", "preview y", "train b", "train c"]


def test_an_endless_row_of_previews_keeps_no_training_back(helper: Stack) -> None:
    helper.alice.feedback("a")
    helper.alice.feedback("b")
    seen = []
    for n in range(5):
        preview(helper.alice, f"x{n}")
        seen += kinds(helper, most=1)
    assert seen == ["preview x0", "train a", "preview x1", "train b", "preview x2"]


def test_training_that_a_preview_lies_between_is_still_one_batch(make_stack: MakeStack) -> None:
    stack = make_stack(coalesce_items=4)
    stack.alice.create()
    stack.alice.feedback("a")
    preview(stack.alice, "x")
    stack.alice.feedback("b")
    assert kinds(stack) == ["preview x", "train a b"]


@pytest.mark.parametrize("end", ["fail", "lost", "cancel"])
def test_however_a_preview_ends_training_comes_next(helper: Stack, end: str) -> None:
    """One that kills every worker must not be tried again and again before the training behind it."""
    sent = preview(helper.alice, "x")
    helper.alice.feedback("a")
    lease = helper.worker.must_lease()
    if end == "fail":
        assert helper.worker.fail(lease).status_code == 204
    elif end == "lost":
        expire(helper)
    else:
        helper.alice.ok("POST", f"/v1/jobs/{sent['id']}/cancel")
        preview(helper.alice, "y")
    assert kinds(helper, most=1) == ["train a"]


def test_a_failed_preview_pauses_itself_but_no_training(make_stack: MakeStack) -> None:
    stack = make_stack(retry_backoff=3600.0)
    stack.alice.create()
    preview(stack.alice, "x")
    stack.worker.fail(stack.worker.must_lease())
    assert stack.worker.lease() is None
    stack.sql("UPDATE adapters SET run_after = 0")
    stack.alice.feedback("a")
    stack.worker.fail(stack.worker.must_lease(), retryable=True)
    assert stack.worker.lease() is None, "the training's own pause"
    stack.sql("UPDATE adapters SET run_after = 0")
    lease = stack.worker.must_lease()
    assert lease.kind == "preview"
    stack.worker.fail(lease)
    assert kinds(stack, most=1) == ["train a"]


def test_a_preview_fails_for_good_like_any_job_and_blocks_nothing(make_stack: MakeStack) -> None:
    stack = make_stack(max_attempts=2)
    stack.alice.create(on_failure="block")
    sent = preview(stack.alice, "x")
    for _ in range(2):
        stack.worker.fail(stack.worker.must_lease())
    job = stack.alice.job(sent["id"])
    assert (job["status"], job["attempts"], job["error"]["code"]) == ("failed", 2, "out_of_memory")
    assert stack.alice.adapter()["blocked_by"] is None
    stack.alice.ok("POST", f"/v1/jobs/{sent['id']}/requeue")
    stack.alice.feedback("a")
    assert kinds(stack) == ["train a", "preview x"]
    assert stack.alice.job(sent["id"])["status"] == "succeeded"


def test_an_old_token_changes_nothing_and_a_result_may_be_sent_twice(helper: Stack) -> None:
    sent = preview(helper.alice)
    frozen = helper.worker.must_lease()
    expire(helper)
    lease = helper.worker.must_lease()
    before = state(helper)
    assert answer(helper, frozen) == 409
    assert state(helper) == before
    assert answer(helper, lease) == 204
    before = state(helper)
    assert answer(helper, lease) == 204, "its acknowledgement may have been lost"
    assert answer(helper, lease.model_copy(update={"token": frozen.token})) == 409
    assert call(helper.worker, lease, "heartbeat") == 409
    assert state(helper) == before
    assert helper.alice.job(sent["id"])["attempts"] == 1


def test_cancelling_fences_and_a_promotion_has_it_made_again(helper: Stack) -> None:
    helper.learn("one")
    sent = preview(helper.alice)
    lease = helper.worker.must_lease()
    helper.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 0})
    assert answer(helper, lease) == 409
    again = helper.worker.must_lease()
    assert (again.kind, again.parent) == ("preview", None)
    helper.alice.ok("POST", f"/v1/jobs/{sent['id']}/cancel")
    assert answer(helper, again) == 409
    assert helper.alice.job(sent["id"])["result"] is None


def test_a_preview_cannot_become_a_version_nor_a_training_a_result(helper: Stack) -> None:
    """A worker from before there were previews would train one."""
    preview(helper.alice)
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.root, lease))
    error_of(helper.worker.commit(lease, files), 409, "not_a_training")
    assert helper.count("versions") == 0
    assert answer(helper, lease) == 204
    helper.alice.feedback()
    training = helper.worker.must_lease()
    sent = helper.worker.call(training, "result", preview=finding(training))
    error_of(sent, 409, "not_a_preview")
    assert helper.worker.train(training) == 1


def test_a_key_is_for_one_preview_and_not_for_feedback_too(helper: Stack) -> None:
    key = {"idempotency-key": "k"}
    first = preview(helper.alice, "one", **key)
    again = helper.alice.post(PREVIEW, batch("one"), headers=key)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first["id"], "true")
    error_of(helper.alice.post("/v1/feedback", batch("one"), headers=key), 409, "idempotency_key_reused")
    helper.alice.feedback("two", key="f")
    error_of(helper.alice.post(PREVIEW, batch("two"), headers={"idempotency-key": "f"}), 409, "idempotency_key_reused")


def test_what_feedback_is_refused_for_a_preview_is_too(helper: Stack) -> None:
    helper.bob.create("theirs")
    foreign = helper.bob.chat("theirs")["id"]
    by_id = {"items": [{"completion_id": foreign, "feedback": "x"}]}
    error_of(helper.alice.post(PREVIEW, by_id), 404, "completion_not_found")
    error_of(helper.alice.post(PREVIEW, batch("x", adapter="theirs")), 404, "adapter_not_found")
    useless = batch("x") | {"training": {"support": "sampled"}}
    error_of(helper.alice.post(PREVIEW, useless), 422, "invalid_training")
    many = helper.alice.post(PREVIEW, batch(*["x"] * (MAX_PREVIEW_ITEMS + 1)))
    assert error_of(many, 422, "invalid_parameter")["param"] == "items"
    assert helper.count("jobs") == helper.count("feedback_items") == 0


@pytest.mark.parametrize("how", ["request", "expiry"])
def test_what_was_previewed_can_be_erased_and_expires(helper: Stack, how: str) -> None:
    """The same remark learnt as feedback stands on: it was not this one that taught it."""
    helper.learn("shorter")
    sent = preview(helper.alice, "shorter")
    answer(helper, helper.worker.must_lease())
    shown = helper.alice.ok("GET", f"/v1/feedback/{sent['batch_id']}")
    assert (shown["job_id"], shown["version"]) == (sent["id"], None)
    assert [(i["feedback"], i["standing"]) for i in shown["items"]] == [("shorter", False)]
    if how == "request":
        erased = helper.alice.ok("DELETE", f"/v1/feedback/{sent['batch_id']}")
        assert len(erased["items"]) == 1
    else:
        helper.sql("UPDATE feedback_batches SET created_at = 1.0 WHERE id = :id", id=sent["batch_id"])
        with helper.context.database.write() as s:
            assert expiry.expire_feedback(s, 2.0, 10) == 1
    assert helper.alice.job(sent["id"])["result"] is None
    kept = helper.rows("SELECT feedback FROM feedback_items ORDER BY feedback")
    assert [row["feedback"] for row in kept] == ["", "shorter"]
    assert helper.alice.ok("GET", "/v1/adapters/helper/versions/1")["standing_feedback"] == ["shorter"]


def test_erasing_what_waits_to_be_previewed_ends_it(helper: Stack) -> None:
    sent = preview(helper.alice, "x")
    helper.alice.ok("DELETE", f"/v1/feedback/{sent['batch_id']}")
    assert helper.alice.job(sent["id"])["status"] == "cancelled"
    assert kinds(helper) == []
