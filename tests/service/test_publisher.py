"""The publisher: load, then move the alias, drain, unload; again and again until the engine serves what it should."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from service.errors import Unavailable
from tests.service.harness import Stack, error_of


def commit(stack: Stack, remark: str = "x", adapter: str = "helper") -> str:
    """Train without waiting for publication; the id of the job."""
    job = str(stack.alice.feedback(remark, adapter=adapter)["job_id"])
    stack.worker.train()
    return job


def test_a_version_is_loaded_before_the_alias_moves(helper: Stack) -> None:
    helper.engine.down = True
    job = commit(helper)
    assert helper.alice.adapter()["live_version"] == 0
    assert helper.alice.adapter()["head_version"] == 1
    assert helper.alice.job(job)["published"] is False
    helper.engine.down = False
    helper.converge()
    assert helper.alice.adapter()["live_version"] == 1
    assert helper.alice.job(job)["published"] is True
    assert helper.engine.events == [("load", helper.served(1))]


def test_the_old_version_is_unloaded_and_the_name_never_used_again(helper: Stack) -> None:
    for remark in ("one", "two", "three"):
        helper.learn(remark)
    assert list(helper.engine.adapters) == [helper.served(3)]
    assert helper.engine.events == [
        ("load", helper.served(1)),
        ("load", helper.served(2)),
        ("unload", helper.served(1)),
        ("load", helper.served(3)),
        ("unload", helper.served(2)),
    ]


def test_drained_means_unused_for_a_while(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(drain_seconds=600.0)
    stack.alice.create()
    stack.learn("one")
    stack.learn("two")
    stack.converge()
    assert set(stack.engine.adapters) == {stack.served(1), stack.served(2)}


def test_after_a_restart_of_the_engine_all_live_versions_come_back_unasked(helper: Stack) -> None:
    helper.alice.create("second")
    helper.learn("one")
    helper.learn("two", adapter="second")
    loaded = dict(helper.engine.adapters)
    helper.engine.forget()
    helper.converge()
    assert helper.engine.adapters == loaded
    assert [e for e in helper.engine.events if e[0] == "chat"] == []


def test_after_a_restart_of_the_service_nothing_is_loaded_twice(make_stack: Callable[..., Stack]) -> None:
    first = make_stack()
    first.alice.create()
    first.learn()
    second = make_stack(first.engine)
    second.converge()
    assert second.alice.says("helper").endswith("-v1")
    loads = [e for e in first.engine.events if e[0] == "load"]
    assert len(loads) == 2, "asked again under the same name, and told that it is there"
    assert len(first.engine.adapters) == 1


def test_a_version_that_the_engine_refuses_twice_is_rejected(helper: Stack) -> None:
    helper.learn("one")
    served = helper.served(1)
    helper.engine.refused[helper.served(2)] = 500
    job = commit(helper, "two")
    helper.converge()
    view = helper.alice.adapter()
    assert (view["live_version"], view["head_version"]) == (1, 1)
    version = helper.alice.ok("GET", "/v1/adapters/helper/versions/2")
    assert version["status"] == "rejected"
    assert version["rejection"].startswith("engine_refused")
    told = helper.alice.job(job)
    assert (told["status"], told["error"]["code"], told["published"]) == ("failed", "version_rejected", False)
    chat = {"model": "helper@v2", "messages": [{"role": "user", "content": "x"}]}
    error_of(helper.alice.post("/v1/chat/completions", chat), 422, "version_rejected")
    assert helper.alice.says("helper").endswith(served)
    helper.alice.feedback("three")
    lease = helper.worker.must_lease()
    assert lease.parent is not None
    assert lease.parent.version == 1
    assert lease.standing_feedback == ["one"]
    assert helper.worker.train(lease) == 3, "numbers are not used again"


def test_one_refusal_is_no_verdict(helper: Stack) -> None:
    helper.engine.refused[helper.served(1)] = 500
    helper.engine.refusals = 1
    commit(helper)
    helper.converge()
    assert helper.alice.adapter()["live_version"] == 1


def test_a_sick_engine_rejects_nothing(helper: Stack) -> None:
    helper.engine.refused[helper.served(1)] = 500
    helper.engine.sick = True
    job = commit(helper)
    helper.converge()
    assert helper.alice.adapter()["head_version"] == 1
    assert helper.alice.job(job)["status"] == "succeeded"
    helper.engine.refused.clear()
    helper.engine.sick = False
    helper.converge()
    assert helper.alice.adapter()["live_version"] == 1


@pytest.mark.parametrize("status", [403, 404, 429, 503])
def test_an_engine_that_does_not_see_the_files_rejects_nothing(helper: Stack, status: int) -> None:
    """A mount that is missing there is no fault of the version."""
    helper.engine.refused[helper.served(1)] = status
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["status"] == "succeeded"
    assert helper.alice.adapter()["live_version"] == 0
    helper.engine.refused.clear()
    helper.converge()
    assert helper.alice.adapter()["live_version"] == 1


def test_a_lost_adapters_directory_rejects_nothing(helper: Stack) -> None:
    helper.engine.down = True
    job = commit(helper)
    helper.root.rename(helper.root.with_name("unmounted"))
    helper.engine.down = False
    helper.converge()
    assert helper.alice.job(job)["status"] == "succeeded"
    helper.root.with_name("unmounted").rename(helper.root)
    helper.converge()
    assert helper.alice.adapter()["live_version"] == 1


def test_files_that_changed_since_the_commit_are_never_loaded(helper: Stack) -> None:
    helper.engine.down = True
    job = commit(helper)
    uri = helper.rows("SELECT uri FROM versions")[0]["uri"]
    weights = helper.root / uri / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    helper.engine.down = False
    helper.converge()
    assert helper.engine.events == []
    assert helper.alice.job(job)["error"]["code"] == "version_rejected"


def test_a_lost_reply_to_a_load_is_success(helper: Stack) -> None:
    helper.engine.lost_replies = 1
    commit(helper)
    for _ in range(2):  # the reply may be lost to this pass or to the one that the commit rang for
        with suppress(Unavailable):
            helper.converge()
    assert helper.engine.lost_replies == 0
    assert helper.alice.adapter()["live_version"] == 1
    assert helper.engine.events == [("load", helper.served(1))] * 2
    assert list(helper.engine.adapters) == [helper.served(1)]


def test_a_name_taken_by_other_files_is_a_refusal(helper: Stack) -> None:
    helper.engine.adapters[helper.served(1)] = "/somewhere/else"
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["error"]["code"] == "version_rejected"


def test_one_broken_adapter_does_not_keep_others_from_being_served(helper: Stack) -> None:
    for other in ("a", "z"):
        helper.alice.create(other)
    helper.engine.down = True
    for adapter in ("helper", "a", "z"):
        commit(helper, adapter=adapter)
    helper.engine.refused = {helper.served(1): 500, helper.served(1, "a"): 404}
    helper.engine.down = False
    helper.converge()
    assert [helper.alice.adapter(a)["live_version"] for a in ("helper", "a", "z")] == [0, 0, 1]
    # The same for live versions after a restart of the engine.
    helper.engine.refused = {helper.served(1, "z"): 500}
    helper.engine.forget()
    helper.converge()
    assert helper.alice.adapter("a")["live_version"] == 1
    assert helper.alice.adapter("z")["live_version"] == 1, "a live version is not taken back"


def test_training_may_be_faster_than_publishing(helper: Stack) -> None:
    """Version 2 is trained from 1 before 1 was served: then 2 is served, and both jobs count as published."""
    helper.engine.down = True
    jobs = [commit(helper, r) for r in ("one", "two")]
    helper.engine.down = False
    helper.converge()
    assert helper.engine.events == [("load", helper.served(2))]
    assert [helper.alice.job(j)["published"] for j in jobs] == [True, True]
    statuses = [v["status"] for v in helper.alice.ok("GET", "/v1/adapters/helper/versions")["data"]]
    assert statuses == ["published", "published"]


def test_a_rejected_head_falls_back_to_its_parent_and_not_behind_it(helper: Stack) -> None:
    helper.engine.down = True
    jobs = [commit(helper, r) for r in ("one", "two")]
    helper.engine.refused[helper.served(2)] = 500
    helper.engine.down = False
    helper.converge()
    helper.converge()
    view = helper.alice.adapter()
    assert (view["live_version"], view["head_version"]) == (1, 1)
    assert [helper.alice.job(j)["status"] for j in jobs] == ["succeeded", "failed"]
    assert helper.alice.job(jobs[0])["published"] is True


def test_a_run_on_a_rejected_head_is_trained_again(helper: Stack) -> None:
    helper.engine.down = True
    commit(helper, "one")
    helper.engine.refused[helper.served(1)] = 500
    second = helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    assert lease.parent is not None
    helper.engine.down = False
    helper.converge()
    assert helper.alice.job(second["job_id"])["status"] == "queued"
    answer = helper.worker.call(lease, "heartbeat")
    error_of(answer, 409, "lease_lost")
    assert helper.worker.must_lease().parent is None


def test_a_deleted_adapter_is_unloaded_and_its_files_go(helper: Stack) -> None:
    helper.learn("one")
    adapter = helper.alice.adapter()["id"]
    helper.alice.get("/v1/adapters/helper/versions/1/download")
    assert len(list(helper.context.settings.archives_root.iterdir())) == 1
    assert (helper.root / adapter).is_dir()
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    helper.converge()
    assert helper.engine.adapters == {}
    assert not (helper.root / adapter).exists()
    assert list(helper.context.settings.archives_root.iterdir()) == []
    assert helper.rows("SELECT purged_at IS NOT NULL AS gone FROM adapters") == [{"gone": 1}]


def test_files_of_a_deleted_adapter_stay_while_the_engine_knows_it(helper: Stack) -> None:
    """An engine that reads a directory which is gone dies."""
    helper.learn("one")
    adapter = helper.alice.adapter()["id"]
    helper.engine.stuck_unloads = True
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    helper.converge()
    assert (helper.root / adapter).is_dir()
    helper.engine.stuck_unloads = False
    helper.converge()
    assert not (helper.root / adapter).exists()


def test_other_peoples_adapters_in_the_engine_are_left_alone(helper: Stack) -> None:
    others = {"somebody-elses": "/x", "adp_0123456789ab-v1": "/other/service/adapters/adp_0123456789ab/run_1/adapter"}
    helper.engine.adapters |= others
    helper.learn("one")
    helper.converge()
    assert others.items() <= helper.engine.adapters.items()
