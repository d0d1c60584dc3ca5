"""Whoever lost the lease changes nothing, and every effect happens once."""

from __future__ import annotations

import threading

import pytest

from tests.service import peft_files
from tests.service.harness import Stack, error_of
from tests.service.lease_calls import call, expire, state


@pytest.mark.parametrize("verb", ["heartbeat", "commit", "fail", "release"])
def test_an_old_token_changes_nothing(helper: Stack, verb: str) -> None:
    helper.alice.feedback()
    frozen = helper.worker.must_lease()
    expire(helper)
    current = helper.worker.must_lease()
    assert current.token > frozen.token
    assert current.run_id != frozen.run_id
    assert current.seed == frozen.seed
    before = state(helper)
    assert call(helper.worker, frozen, verb) == 409
    # Nor does the old run under a token that was guessed right.
    assert call(helper.worker, frozen.model_copy(update={"token": current.token}), verb) == 409
    assert state(helper) == before
    assert helper.worker.train(current) == 1


@pytest.mark.parametrize("verb", ["heartbeat", "commit", "fail", "release"])
def test_an_unknown_run_is_404(helper: Stack, verb: str) -> None:
    helper.alice.feedback()
    lease = helper.worker.must_lease().model_copy(update={"run_id": "run_00"})
    assert call(helper.worker, lease, verb) == 404
    strange = helper.worker.caller.post(f"/worker/v1/runs/..%2f/{verb}", {"token": 1})
    assert strange.status_code in (404, 422)


def test_a_late_worker_that_still_holds_the_token_may_commit(helper: Stack) -> None:
    """An expired lease that nobody took is no reason to throw the work away."""
    helper.alice.feedback()
    lease = helper.worker.must_lease()
    expire(helper)
    assert call(helper.worker, lease, "heartbeat") == 200
    assert helper.worker.lease() is None
    assert helper.worker.train(lease) == 1


def test_a_commit_sent_again_is_the_same_version_applied_once(helper: Stack) -> None:
    helper.alice.feedback()
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.root, lease))
    first = helper.worker.commit(lease, files)
    helper.converge()  # the alias has moved: nothing else is to come
    before = state(helper)
    again = helper.worker.commit(lease, files)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert state(helper) == before
    assert helper.count("applications") == 1


def test_two_commits_at_once_are_one_version(helper: Stack) -> None:
    helper.alice.feedback()
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.root, lease))
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(helper.worker.commit(lease, files).status_code)) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200, 200]
    assert (helper.count("versions"), helper.count("applications")) == (1, 1)


@pytest.mark.parametrize("verb", ["heartbeat", "commit", "fail", "release"])
def test_cancelling_a_running_job_fences_its_worker(helper: Stack, verb: str) -> None:
    sent, after = helper.alice.feedback("one"), helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    helper.alice.ok("POST", f"/v1/jobs/{sent['job_id']}/cancel")
    before = state(helper)
    assert call(helper.worker, lease, verb) == 409
    assert state(helper) == before
    assert helper.alice.job(sent["job_id"])["status"] == "cancelled"
    helper.worker.train()
    assert helper.alice.job(after["job_id"])["version"] == 1


def test_deleting_an_adapter_ends_what_runs_and_waits(helper: Stack) -> None:
    jobs = [helper.alice.feedback(r)["job_id"] for r in ("one", "two")]
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.root, lease))
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    error_of(helper.worker.commit(lease, files), 409, "lease_lost")  # its files may be gone already
    assert call(helper.worker, lease, "heartbeat") == 409
    assert helper.worker.lease() is None
    assert [helper.alice.job(j)["status"] for j in jobs] == ["cancelled"] * 2
    assert helper.count("versions") == 0


def test_a_promotion_fences_the_run_and_its_job_is_trained_from_there(helper: Stack) -> None:
    helper.learn("one")
    helper.learn("two")
    sent = helper.alice.feedback("three")
    lease = helper.worker.must_lease()
    assert lease.parent is not None
    assert lease.parent.version == 2
    helper.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})
    assert call(helper.worker, lease, "commit") == 409
    assert helper.alice.job(sent["job_id"])["status"] == "queued"
    again = helper.worker.must_lease()
    assert again.parent is not None
    assert again.parent.version == 1
    assert again.standing_feedback == ["one"]
    assert helper.worker.train(again) == 3
    assert helper.alice.ok("GET", "/v1/adapters/helper/versions/3")["parent"] == 1


def test_a_version_of_another_head_than_the_runs_is_refused(helper: Stack) -> None:
    """Whatever moves the head fences the run as well; were there a way that does not, the commit still looks."""
    helper.learn("one")
    helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    helper.sql("UPDATE adapters SET head_n = 0")
    before = state(helper)
    assert call(helper.worker, lease, "commit") == 409
    assert state(helper) == before
