"""Rollouts and feedback have their days: no longer, no shorter, and nothing that is still needed goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.serving import retention
from service.store import expiry
from tests.service.harness import Json, Stack, batch, error_of

MakeStack = Callable[..., Stack]
DAY = 86400.0


@pytest.fixture
def limited(make_stack: MakeStack) -> Stack:
    stack = make_stack(keep_feedback_days=30, keep_rollouts_days=7)
    stack.alice.create()
    return stack


def grow_old(stack: Stack, days: float) -> None:
    stack.sql("UPDATE rollouts SET created_at = created_at - :t", t=days * DAY)
    stack.sql("UPDATE feedback_batches SET created_at = created_at - :t", t=days * DAY)


def remark(stack: Stack, words: str = "shorter") -> Json:
    completion = stack.alice.chat()["id"]
    return stack.alice.ok("POST", "/v1/feedback", {"items": [{"completion_id": completion, "feedback": words}]})


def texts(stack: Stack) -> list[str]:
    return [str(r["feedback"]) for r in stack.rows("SELECT feedback FROM feedback_items ORDER BY feedback")]


def test_everything_is_kept_by_default(helper: Stack) -> None:
    helper.learn("kept")
    helper.alice.chat()
    grow_old(helper, 10_000)
    helper.converge()
    assert texts(helper) == ["kept"]
    assert helper.count("rollouts") == 1


def test_an_answer_goes_after_its_days_unless_feedback_is_about_it(limited: Stack) -> None:
    limited.learn("first")
    limited.alice.chat()
    remark(limited, "about an answer")
    limited.worker.train()
    grow_old(limited, 6.9)
    limited.converge()
    assert limited.count("rollouts") == 2
    grow_old(limited, 0.2)
    limited.converge()
    assert limited.count("rollouts") == 1
    assert texts(limited) == ["about an answer", "first"]


def test_feedback_goes_after_its_days_and_its_answer_with_it(limited: Stack) -> None:
    sent = remark(limited)
    limited.worker.train()
    limited.converge()
    grow_old(limited, 31)
    limited.converge()
    assert texts(limited) == [""]
    assert limited.count("rollouts") == 0
    (item,) = limited.alice.ok("GET", f"/v1/feedback/{sent['id']}")["items"]
    assert (item["erased"], item["feedback"]) == ("retention", "")
    version = limited.alice.ok("GET", "/v1/adapters/helper/versions/1")
    assert version["feedback_ids"] == [item["id"]]
    assert not version["learnt_erased"], "it was told to forget the words, not what they taught"
    assert version["standing_feedback"] == ["shorter"], "what the next batch's teacher is told stays"
    assert limited.alice.says("helper").endswith("-v1")


@pytest.mark.parametrize("state", ["queued", "running"])
def test_what_an_open_job_needs_does_not_expire(limited: Stack, state: str) -> None:
    remark(limited)
    lease = limited.worker.must_lease() if state == "running" else None
    grow_old(limited, 365)
    limited.converge()
    assert texts(limited) == ["shorter"]
    lease = lease or limited.worker.must_lease()
    assert limited.worker.train(lease) == 1
    limited.converge()
    assert texts(limited) == [""]


def test_a_dead_letter_whose_feedback_expired_is_over(limited: Stack) -> None:
    sent = remark(limited)
    limited.worker.fail(limited.worker.must_lease(), retryable=False)
    grow_old(limited, 31)
    limited.converge()
    assert limited.alice.job(sent["job_id"])["status"] == "cancelled"
    error_of(limited.alice.post(f"/v1/jobs/{sent['job_id']}/requeue"), 409, "job_not_failed")


def test_a_pass_is_made_of_small_transactions_and_ends(limited: Stack) -> None:
    many = batch(*(f"remark {i}" for i in range(450)))
    sent = limited.alice.ok("POST", "/v1/feedback", many | {"items": [i | {"standing": False} for i in many["items"]]})
    limited.worker.train()
    grow_old(limited, 31)
    assert limited.alice.job(sent["job_id"])["status"] == "succeeded"
    with limited.context.database.write() as s:
        assert expiry.expire_feedback(s, limited.now() - 30 * DAY, retention.EXPIRING) == retention.EXPIRING
    limited.converge()
    assert set(texts(limited)) == {""}


def test_what_has_expired_can_still_be_erased_from_what_stands(limited: Stack) -> None:
    completion = limited.alice.chat(user="carol")["id"]
    body = {"items": [{"completion_id": completion, "feedback": "call me carol"}]}
    limited.alice.ok("POST", "/v1/feedback", body)
    limited.worker.train()
    limited.converge()
    grow_old(limited, 31)
    limited.alice.feedback("younger")
    limited.worker.train()
    limited.converge()
    newest = limited.alice.ok("GET", "/v1/adapters/helper/versions/2")
    assert newest["standing_feedback"] == ["call me carol", "younger"]
    erased = limited.alice.ok("DELETE", "/v1/users/carol")
    assert erased["learnt_by"] == [{"adapter": "helper", "versions": [1, 2]}]
    newest = limited.alice.ok("GET", "/v1/adapters/helper/versions/2")
    assert newest["standing_feedback"] == ["younger"]
    assert limited.alice.ok("DELETE", "/v1/users/carol")["items"] == []
