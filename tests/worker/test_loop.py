"""The real supervisor and its real training process against a service with behaviour."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

LONG = {"steps": 64, "learning_rate": 1e-5}


def long_items(make_item: Callable[..., Any]) -> list[Any]:
    """So much text that 64 steps outlast any test that interrupts them; a single step stays short."""
    return [make_item(n, words=120) for n in range(12)]


def test_a_batch_becomes_a_version(worker: Any, service: Any, read_json: Any) -> None:
    job = service.wait_for_state(service.enqueue("adp_happy", items=3), "succeeded")
    assert [f.name for f in job.commit.files] == [
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/perennial.json",
        "trainer/optimizer.json",
        "trainer/optimizer.safetensors",
    ]
    assert [m.step for m in job.commit.metrics] == [1, 2]
    assert [(i.id, i.behaviour, i.taught) for i in job.commit.items] == [
        (f"item-{n}", "recomputed", True) for n in range(3)
    ]
    assert job.commit.standing_feedback == ["in capitals, please"]
    config = read_json(service.root / job.commit.uri / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "tiny/base"
    assert sorted(p.name for p in (service.root / "adp_happy").iterdir()) == [job.run_id]


def test_a_lost_acknowledgement_gives_one_version(worker: Any, service: Any) -> None:
    service.cut_commits = 1
    job = service.wait_for_state(service.enqueue("adp_cut"), "succeeded")
    service.wait(lambda: service.calls.count(f"commit {job.run_id}") == 2, "the commit was not repeated")
    following = service.wait_for_state(service.enqueue("adp_cut"), "succeeded")
    assert [v.uri for v in service.heads["adp_cut"].versions] == [job.commit.uri, following.commit.uri]


def test_an_unavailable_service_is_asked_again(worker: Any, service: Any) -> None:
    service.unavailable = 3
    service.wait_for_state(service.enqueue("adp_503"), "succeeded")
    assert len(service.heads["adp_503"].versions) == 1


def test_losing_the_lease_kills_the_training(
    worker: Any, service: Any, make_item: Any, wait_for_exit: Callable[[int], None]
) -> None:
    number = service.enqueue("adp_lost", long_items(make_item), training=LONG)
    job = service.wait_for_steps(number)
    [trainer] = worker.children()
    service.fence(number)
    wait_for_exit(trainer)
    service.wait_for_state(service.enqueue("adp_after_loss"), "succeeded")
    assert f"commit {job.run_id}" not in service.calls
    assert list(service.root.glob("adp_lost/*")) == []


def test_a_cancelled_job_stops_between_steps(worker: Any, service: Any, make_item: Any) -> None:
    number = service.enqueue("adp_cancel", long_items(make_item), training=LONG)
    job = service.wait_for_steps(number)
    trainers = worker.children()
    service.cancel.add(number)
    service.wait_for_state(number, "cancelled")
    service.wait_for_state(service.enqueue("adp_after_cancel"), "succeeded")
    assert worker.children() == trainers, "a stop between steps keeps the base model resident"
    assert f"commit {job.run_id}" not in service.calls
    assert job.commit is None


def test_a_killed_trainer_fails_its_job_alone(worker: Any, service: Any, make_item: Any) -> None:
    number = service.enqueue("adp_oom", long_items(make_item), training=LONG)
    service.wait_for_steps(number)
    [trainer] = worker.children()
    os.kill(trainer, signal.SIGKILL)
    job = service.wait_for_state(number, "failed")
    assert job.error["code"] == "trainer_died"
    assert job.error["retryable"] is True
    assert "SIGKILL" in job.error["message"]
    service.wait_for_state(service.enqueue("adp_after_oom"), "succeeded")


def test_a_refused_version_does_not_stop_the_worker(worker: Any, service: Any) -> None:
    service.reject_versions = True
    job = service.wait_for_state(service.enqueue("adp_refused"), "failed")
    service.reject_versions = False
    assert job.error["code"] == "version_rejected"
    service.wait_for_state(service.enqueue("adp_refused"), "succeeded")
    assert f"fail {job.run_id}" not in service.calls


def test_the_next_version_goes_on_where_its_parent_stopped(worker: Any, service: Any, read_json: Any) -> None:
    first = service.wait_for_state(service.enqueue("adp_chain"), "succeeded")
    second = service.wait_for_state(
        service.enqueue("adp_chain", training={"learning_rate": 1e-3, "steps": 3}), "succeeded"
    )
    counts = [
        set(read_json(service.root / job.commit.uri / "trainer" / "optimizer.json")["steps"].values())
        for job in (first, second)
    ]
    assert counts == [{2}, {5}], "step counts are carried over"
    assert {m.learning_rate for m in second.commit.metrics} == {1e-3}, "the rate is the request's, not the state's"
    provenance = read_json(service.root / second.commit.uri / "adapter" / "perennial.json")
    assert provenance["parent"]["digest"] == service.heads["adp_chain"].versions[0].digest


def test_a_preview_is_sent_and_leaves_no_version(worker: Any, service: Any, make_item: Any) -> None:
    """Its acknowledgement is lost once: it is sent again, and counts once."""
    first = service.wait_for_state(service.enqueue("adp_preview"), "succeeded")
    trainers = worker.children()
    service.cut_commits = 1
    job = service.wait_for_state(service.enqueue("adp_preview", items=3, kind="preview"), "succeeded")
    service.wait(lambda: service.calls.count(f"result {job.run_id}") == 2, "the result was not repeated")
    assert (job.preview.version, len(job.preview.items), job.attempts) == (1, 3, 0)
    following = service.wait_for_state(service.enqueue("adp_preview"), "succeeded")
    assert [v.uri for v in service.heads["adp_preview"].versions] == [first.commit.uri, following.commit.uri]
    assert {p.name for p in (service.root / "adp_preview").iterdir()} == {first.run_id, following.run_id}
    assert worker.children() == trainers


def test_a_preview_that_cannot_be_made_fails_with_its_reason(worker: Any, service: Any, make_item: Any) -> None:
    item = make_item(1, feedback="x" * 2000)
    job = service.wait_for_state(service.enqueue("adp_long_preview", [item], kind="preview"), "failed")
    assert (job.error["code"], job.error["retryable"]) == ("context_too_long", False)


def test_a_changed_parent_is_refused(worker: Any, service: Any) -> None:
    first = service.wait_for_state(service.enqueue("adp_corrupt"), "succeeded")
    weights = service.root / first.commit.uri / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    job = service.wait_for_state(service.enqueue("adp_corrupt"), "failed")
    assert job.error["code"] == "parent_corrupt"
    assert job.error["retryable"] is False


def test_an_overlong_context_names_both_lengths(worker: Any, service: Any, make_item: Any) -> None:
    item = make_item(1, feedback="x" * 2000, response_token_ids=[5] * 77, prompt_token_ids=[4] * 9)
    job = service.wait_for_state(service.enqueue("adp_long", [item]), "failed")
    assert (job.error["code"], job.error["retryable"]) == ("context_too_long", False)
    assert "77" in job.error["message"]


def test_logs_hold_no_user_text(worker: Any, service: Any, make_item: Any) -> None:
    item = make_item(1, feedback="canary-feedback", messages=[{"role": "user", "content": "canary-prompt"}])
    service.wait_for_state(service.enqueue("adp_canary", [item]), "succeeded")
    assert "adp_canary" in worker.log
    assert "canary-feedback" not in worker.log
    assert "canary-prompt" not in worker.log
