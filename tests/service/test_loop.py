"""The whole way once: answer, remark, training, a served version."""

from __future__ import annotations

from tests.service.harness import Stack


def test_a_remark_becomes_a_served_version(stack: Stack) -> None:
    adapter = stack.alice.create()
    first = stack.alice.chat()
    assert first["model"] == "helper@v0"
    assert first["choices"][0]["message"]["content"] == "I am tiny/base"
    items = [{"completion_id": first["id"], "feedback": "say more"}]
    sent = stack.alice.ok("POST", "/v1/feedback", {"items": items})
    assert stack.worker.train() == 1
    stack.converge()
    second = stack.alice.chat()
    assert second["model"] == "helper@v1"
    assert second["choices"][0]["message"]["content"] == f"I am {adapter['id']}-v1"
    job = stack.alice.job(sent["job_id"])
    assert (job["status"], job["version"], job["published"]) == ("succeeded", 1, True)
    assert [m["loss"] for m in job["metrics"]] == [0.5]
    version = stack.alice.ok("GET", "/v1/adapters/helper/versions/1")
    assert version["status"] == "published"
    assert version["live"] is True
    assert version["standing_feedback"] == ["say more"]
    assert version["batch_ids"] == [sent["id"]]
    known = stack.alice.ok("GET", f"/v1/feedback/{sent['id']}")
    assert [i["id"] for i in known["items"]] == version["feedback_ids"]
    assert known["status"] == "succeeded"
