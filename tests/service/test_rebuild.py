"""An adapter built anew without what was erased: from where, of what, in which order, and what answers meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from api_schemas.worker import Lease
from tests.service import peft_files
from tests.service.harness import Json, Stack, batch, error_of
from tests.service.test_uploads import upload, weights

MakeStack = Callable[..., Stack]


def teach(stack: Stack, *remarks: str, **fields: object) -> Json:
    """One batch, trained and published; returns it."""
    sent = stack.alice.ok("POST", "/v1/feedback", batch(*remarks) | fields)
    stack.worker.train()
    stack.converge()
    return sent


def forget(stack: Stack, sent: Json) -> Json:
    return stack.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")


def rebuild(stack: Stack, **fields: str) -> Json:
    answer = stack.alice.post("/v1/adapters/helper/rebuild", fields or None)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def train_all(stack: Stack) -> list[Lease]:
    leases = []
    while (lease := stack.worker.lease()) is not None:
        stack.worker.train(lease)
        leases.append(lease)
    return leases


def said(leases: list[Lease]) -> list[list[str]]:
    return [[i.feedback for i in lease.items] for lease in leases]


def version(stack: Stack, n: int) -> Json:
    return stack.alice.ok("GET", f"/v1/adapters/helper/versions/{n}")


def pointers(stack: Stack) -> tuple[int, int]:
    adapter = stack.alice.adapter()
    return adapter["live_version"], adapter["head_version"]


def test_it_goes_back_to_the_last_clean_version_and_trains_the_rest_in_order(helper: Stack) -> None:
    teach(helper, "one")
    secret = teach(helper, "secret", training={"steps": 7})
    kept = [teach(helper, "three", training={"steps": 3}), teach(helper, "four", "and five", training={"seed": 99})]
    originals = [version(helper, n) for n in (3, 4)]
    forget(helper, secret)
    made = rebuild(helper)
    assert (made["from_version"], made["replaces"], len(made["job_ids"])) == (1, [2, 3, 4], 2)
    leases = train_all(helper)
    assert said(leases) == [["three"], ["four", "and five"]]
    assert [(lease.seed, lease.training.steps) for lease in leases] == [(3, 3), (99, 8)]
    assert [lease.parent.version for lease in leases if lease.parent] == [1, 5]
    assert [lease.standing_feedback for lease in leases] == [["one"], ["one", "three"]]
    for rebuilt, original, sent in zip((5, 6), originals, kept, strict=True):
        found = version(helper, rebuilt)
        assert {k: found[k] for k in ("batch_ids", "feedback_ids", "training", "seed")} == {
            k: original[k] for k in ("batch_ids", "feedback_ids", "training", "seed")
        }
        assert not found["learnt_erased"]
        again = helper.alice.ok("GET", f"/v1/feedback/{sent['id']}")
        assert (again["version"], again["status"]) == (rebuilt, "succeeded")
    assert helper.alice.job(made["job_ids"][0])["batch_id"] == kept[0]["id"]


def test_a_version_of_several_batches_is_one_again_less_what_was_erased(make_stack: MakeStack) -> None:
    stack = make_stack(coalesce_items=4)
    stack.alice.create()
    sent = [stack.alice.ok("POST", "/v1/feedback", batch(*part)) for part in (["a"], ["b", "secret"], ["c"])]
    stack.worker.train()
    stack.alice.feedback("d")
    stack.worker.train()
    stack.converge()
    (row,) = stack.rows("SELECT id FROM feedback_items WHERE feedback = 'secret'")
    stack.alice.ok("DELETE", f"/v1/feedback/items/{row['id']}")
    forget(stack, sent[0])
    made = rebuild(stack)
    leases = train_all(stack)
    assert said(leases) == [["b", "c"], ["d"]], "neither joined with what follows, nor taken apart"
    assert (leases[0].seed, leases[0].parent) == (1, None)
    assert len(made["job_ids"]) == 3
    assert version(stack, 3)["feedback_ids"] == [i.id for i in leases[0].items]


@pytest.mark.parametrize("meanwhile", ["current", "clean"])
def test_what_answers_meanwhile_is_the_callers_choice(helper: Stack, meanwhile: str) -> None:
    teach(helper, "one")
    secret = teach(helper, "secret")
    teach(helper, "three")
    teach(helper, "four")
    forget(helper, secret)
    rebuild(helper, serve_meanwhile=meanwhile)
    seen = []
    for _ in range(3):
        helper.converge()
        seen.append(pointers(helper)[0])
        assert helper.alice.says("helper").endswith(f"-v{seen[-1]}")
        if (lease := helper.worker.lease()) is not None:
            helper.worker.train(lease)
    assert seen == ([4, 4, 6] if meanwhile == "current" else [1, 5, 6])


def test_replaced_versions_lose_their_files_once_nothing_points_to_them(helper: Stack) -> None:
    teach(helper, "one")
    secret = teach(helper, "secret")
    teach(helper, "three")
    forget(helper, secret)
    rebuild(helper)
    helper.converge()
    assert version(helper, 3)["files"] == "kept", "it answers"
    error_of(helper.alice.post("/v1/adapters/helper/promote", {"version": 1}), 409, "rebuild_runs")
    train_all(helper)
    for _ in range(3):
        helper.converge()
    assert pointers(helper) == (4, 4)
    assert [version(helper, n)["files"] for n in (1, 2, 3, 4)] == ["kept", "removed", "removed", "kept"]
    assert [(helper.root / r["uri"]).exists() for r in helper.rows("SELECT uri FROM versions ORDER BY n")] == [
        True, False, False, True,
    ]  # fmt: skip
    error_of(helper.alice.post("/v1/adapters/helper/promote", {"version": 3}), 410, "version_removed")
    error_of(helper.alice.post("/v1/adapters/helper/rebuild"), 409, "nothing_to_rebuild")
    assert helper.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})["live_version"] == 1


def test_with_nothing_learnt_since_the_clean_version_serves_at_once(helper: Stack) -> None:
    secret = teach(helper, "secret")
    forget(helper, secret)
    made = rebuild(helper)
    assert (made["from_version"], made["replaces"], made["job_ids"]) == (0, [1], [])
    helper.converge()
    assert pointers(helper) == (0, 0)
    assert helper.alice.says("helper").endswith(peft_files.BASE)


def test_without_an_erasure_there_is_nothing_to_rebuild(helper: Stack) -> None:
    teach(helper, "one")
    error_of(helper.alice.post("/v1/adapters/helper/rebuild"), 409, "nothing_to_rebuild")


def test_what_waited_and_what_ran_comes_after_the_replays(helper: Stack) -> None:
    secret, _ = teach(helper, "secret"), teach(helper, "two")
    waiting = [helper.alice.feedback(r)["job_id"] for r in ("runs", "waits")]
    running = helper.worker.must_lease()
    forget(helper, secret)
    rebuild(helper)
    assert helper.worker.call(running, "heartbeat").status_code == 409, "it trains on what the erased item made"
    leases = train_all(helper)
    assert said(leases) == [["two"], ["runs"], ["waits"]]
    assert leases[1].seed == running.seed, "a training batch that was formed trains as it would have"
    sequence = [helper.alice.job(j)["sequence"] for j in waiting]
    assert sequence == sorted(sequence)
    helper.converge()
    assert pointers(helper) == (5, 5)
    assert helper.alice.adapter()["queued_jobs"] == 0


def test_another_erasure_during_a_rebuild_leaves_its_item_out_too(helper: Stack) -> None:
    first, second = teach(helper, "secret"), teach(helper, "secret too")
    teach(helper, "three")
    forget(helper, first)
    rebuild(helper)
    helper.worker.train()
    assert forget(helper, second)["learnt_by"] == [{"adapter": "helper", "versions": [2, 3, 4]}]
    made = rebuild(helper)
    assert (made["from_version"], made["replaces"], made["job_ids"]) == (0, [4], [])
    helper.converge()
    assert pointers(helper) == (3, 0), "the replay of the first rebuild is still waited for"
    assert said(train_all(helper)) == [["three"]]
    helper.converge()
    assert pointers(helper) == (5, 5)
    assert not version(helper, 5)["learnt_erased"]


def test_only_the_line_of_the_head_counts(helper: Stack) -> None:
    """A rollback left the erased item on a branch that nothing goes on from."""
    teach(helper, "one")
    secret = teach(helper, "secret")
    helper.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})
    teach(helper, "three")
    assert forget(helper, secret)["learnt_by"] == [{"adapter": "helper", "versions": [2]}]
    made = rebuild(helper)
    assert (made["from_version"], made["replaces"], made["job_ids"]) == (3, [2], [])
    helper.converge()
    helper.converge()
    assert pointers(helper) == (3, 3)
    assert version(helper, 2)["files"] == "removed"


def test_an_uploads_weights_learnt_nothing_here_and_its_standing_remarks_may_have_taught(helper: Stack) -> None:
    secret = teach(helper, "secret")
    upload(helper, weights())
    helper.converge()
    teach(helper, "three")
    assert forget(helper, secret)["learnt_by"] == [{"adapter": "helper", "versions": [1, 3]}]
    versions = [version(helper, n) for n in (1, 2, 3)]
    assert [v["learnt_erased"] for v in versions] == [True, False, True], "3 was told the remark"
    made = rebuild(helper)
    assert (made["from_version"], made["replaces"], len(made["job_ids"])) == (2, [1, 3], 1)
    (lease,) = train_all(helper)
    assert ([i.feedback for i in lease.items], lease.standing_feedback) == (["three"], [])
    assert lease.parent is not None
    assert lease.parent.version == 2


def test_an_upload_during_a_rebuild_is_refused(helper: Stack) -> None:
    secret, _ = teach(helper, "secret"), teach(helper, "two")
    forget(helper, secret)
    rebuild(helper)
    with pytest.raises(AssertionError, match="rebuild_runs"):
        upload(helper, weights())
    versions = {r["uri"] for r in helper.rows("SELECT uri FROM versions")}
    left = {f"{p.parent.name}/{p.name}" for p in helper.root.glob("adp_*/run_*")}
    assert left <= versions, "nothing is left of it"


def test_files_that_retention_took_are_trained_anew_from_further_back(make_stack: MakeStack) -> None:
    stack = make_stack(keep_versions=1, retention_grace_seconds=0.0)
    stack.alice.create()
    for remark in ("one", "two"):
        teach(stack, remark)
    secret = teach(stack, "secret")
    for remark in ("four", "five"):
        teach(stack, remark)
    stack.converge()
    assert [version(stack, n)["files"] for n in (1, 2, 3)] == ["removed"] * 3
    forget(stack, secret)
    made = rebuild(stack)
    assert (made["from_version"], made["replaces"]) == (0, [3, 4, 5])
    assert said(train_all(stack)) == [["one"], ["two"], ["four"], ["five"]]


def test_expired_feedback_makes_a_rebuild_impossible_and_it_says_so(make_stack: MakeStack) -> None:
    stack = make_stack(keep_feedback_days=1)
    stack.alice.create()
    secret, _ = teach(stack, "secret"), teach(stack, "two")
    forget(stack, secret)
    stack.sql("UPDATE feedback_batches SET created_at = created_at - 2 * 86400")
    stack.converge()
    refused = error_of(stack.alice.post("/v1/adapters/helper/rebuild"), 409, "not_rebuildable")
    assert "version 2" in refused["message"]
    assert pointers(stack) == (2, 2)
    assert stack.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 0})["live_version"] == 0


def test_a_replay_that_fails_for_good_ends_the_wait(helper: Stack) -> None:
    """As it would have for an adapter that never saw the item: what comes after it goes on, and is served."""
    secret, _, _ = teach(helper, "secret"), teach(helper, "two"), teach(helper, "three")
    forget(helper, secret)
    made = rebuild(helper)
    helper.worker.fail(helper.worker.must_lease(), retryable=False, code="diverged")
    assert helper.alice.job(made["job_ids"][0])["status"] == "failed"
    assert said(train_all(helper)) == [["three"]]
    helper.converge()
    assert pointers(helper) == (4, 4)


def test_a_replayed_lease_differs_only_in_what_was_erased(helper: Stack) -> None:
    """Answers of the adapter's own versions too: the same ids, log-probs, sampling, and the version that gave them."""

    def learn(remarks: list[str]) -> Any:
        items = [{"completion_id": helper.alice.chat(content=r)["id"], "feedback": r} for r in remarks]
        helper.alice.ok("POST", "/v1/feedback", {"items": items})
        lease = helper.worker.must_lease()
        helper.worker.train(lease)
        helper.converge()
        return lease

    teach(helper, "one")
    first, second = learn(["two", "secret"]), learn(["three"])
    helper.alice.ok("DELETE", f"/v1/feedback/items/{first.items[1].id}")
    rebuild(helper)
    again = train_all(helper)
    assert said(again) == [["two"], ["three"]]
    for replay, original in zip(again, (first, second), strict=True):
        assert list(replay.items) == [i for i in original.items if i.feedback != "secret"]
        changed = {"run_id", "token", "parent", "items", "standing_feedback"}
        assert replay.model_dump(exclude=changed) == original.model_dump(exclude=changed)
