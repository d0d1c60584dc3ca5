"""Erasing what users said: nothing of it in any file, learnt by nobody afterwards, and who learnt it is named."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import JSON, String

from service.db.tables import Base
from tests.service.harness import Json, Stack, batch, error_of
from tests.service.lease_calls import call

SECRET = "zebra-tessellation-4711"
TOKENS = [730000 + 37 * i for i in range(40)]


def places_of(words: str, root: Path) -> list[str]:
    """Every file below a directory that holds these bytes, in plain or in UTF-16, whole or as JSON writes them."""
    forms = {words.encode(), words.encode("utf-16-le"), json.dumps(words)[1:-1].encode()}
    return [str(p) for p in sorted(root.rglob("*")) if p.is_file() and any(f in p.read_bytes() for f in forms)]


def anywhere(stack: Stack) -> list[str]:
    """Where the secret words or the secret tokens are to be found."""
    data = stack.context.settings.data_dir
    tokens = [f"{a}, {b}" for a, b in pairwise(TOKENS)] + [f"{a},{a + 37}" for a in TOKENS]
    return [p for words in (SECRET, *tokens) for p in places_of(words, data)]


def secret_answer(stack: Stack, **fields: object) -> str:
    """A completion whose prompt and token ids are the secret ones."""
    completion = str(stack.alice.chat(content=f"what is {SECRET}?", **fields)["id"])
    ids = {"p": json.dumps(TOKENS), "r": json.dumps(TOKENS[:3]), "id": completion}
    stack.sql("UPDATE rollouts SET prompt_token_ids = :p, response_token_ids = :r WHERE id = :id", **ids)
    stack.sql("UPDATE rollouts SET logprobs = '[-0.5, -0.5, -0.5]' WHERE id = :id", id=completion)
    return completion


def remark_on(stack: Stack, completion: str, remark: str = f"never say {SECRET}", **fields: object) -> Json:
    body = {"items": [{"completion_id": completion, "feedback": remark} | fields], "adapter": "helper"}
    return stack.alice.ok("POST", "/v1/feedback", body)


def items_of(stack: Stack, batch_id: str) -> list[Json]:
    return list(stack.alice.ok("GET", f"/v1/feedback/{batch_id}")["items"])


def fill(stack: Stack, n: int) -> None:
    """Rows around, so that pages of the database are split and joined."""
    for i in range(n):
        stack.alice.chat(content=f"filler {i} " * (1 + i * 7 % 60))


def test_an_erased_item_is_nowhere_in_database_files_and_its_versions_are_named(helper: Stack) -> None:
    helper.learn("lower case")
    fill(helper, 20)
    sent = remark_on(helper, secret_answer(helper), demonstration=f"{SECRET}, or so")
    fill(helper, 20)
    helper.worker.train()
    helper.converge()
    helper.learn("no emoji")
    assert len(anywhere(helper)) > 0
    (item,) = items_of(helper, sent["id"])
    erased = helper.alice.ok("DELETE", f"/v1/feedback/items/{item['id']}")
    assert anywhere(helper) == []
    assert erased["items"] == [item["id"]]
    assert erased["completions"] == [item["completion_id"]]
    assert erased["learnt_by"] == [{"adapter": "helper", "versions": [2, 3]}]
    assert erased["scrubbed"]
    versions = helper.alice.ok("GET", "/v1/adapters/helper/versions")["data"]
    assert [v["learnt_erased"] for v in versions] == [False, True, True]
    assert [v["standing_feedback"] for v in versions] == [["lower case"], ["lower case"], ["lower case", "no emoji"]]
    assert versions[1]["feedback_ids"] == [item["id"]], "the record of what it learnt from stays"
    (left,) = items_of(helper, sent["id"])
    assert (left["erased"], left["feedback"], left["completion_id"]) == ("request", "", None)


def test_what_others_said_stays(helper: Stack) -> None:
    helper.alice.ok("POST", "/v1/feedback", batch("stays one", SECRET, "stays two"))
    (row,) = helper.rows("SELECT id FROM feedback_items WHERE feedback = :s", s=SECRET)
    helper.alice.ok("DELETE", f"/v1/feedback/items/{row['id']}")
    assert anywhere(helper) == []
    assert [i.feedback for i in helper.worker.must_lease().items] == ["stays one", "stays two"]


def test_a_second_time_is_answered_alike(helper: Stack) -> None:
    sent = remark_on(helper, secret_answer(helper))
    helper.worker.train()
    first, second = (helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}") for _ in range(2))
    assert first["learnt_by"] == second["learnt_by"] == [{"adapter": "helper", "versions": [1]}]
    assert first["items"] == second["items"] != []


def test_a_queued_item_leaves_its_job_and_an_empty_job_ends(helper: Stack) -> None:
    sent = helper.alice.ok("POST", "/v1/feedback", batch(SECRET))
    after = helper.alice.feedback("after")
    erased = helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert erased["cancelled_jobs"] == [sent["job_id"]]
    assert helper.alice.job(sent["job_id"])["status"] == "cancelled"
    assert helper.alice.job(sent["job_id"])["error"]["code"] == "feedback_erased"
    assert helper.worker.must_lease().batch_ids == [after["id"]]
    assert helper.alice.adapter()["queued_jobs"] == 1


@pytest.mark.parametrize("alone", [True, False])
def test_a_run_that_trains_on_it_is_fenced_and_formed_again_without_it(helper: Stack, alone: bool) -> None:
    sent = helper.alice.ok("POST", "/v1/feedback", batch(*([SECRET] if alone else [SECRET, "stays"])))
    lease = helper.worker.must_lease()
    helper.alice.ok("DELETE", f"/v1/feedback/items/{lease.items[0].id}")
    assert {verb: call(helper.worker, lease, verb) for verb in ("heartbeat", "commit")} == {
        "heartbeat": 409, "commit": 409,
    }  # fmt: skip
    assert helper.count("versions") == 0
    again = helper.worker.lease()
    if alone:
        assert again is None
        assert helper.alice.job(sent["job_id"])["status"] == "cancelled"
    else:
        assert again is not None
        assert [i.feedback for i in again.items] == ["stays"]
        assert again.token > lease.token
        assert helper.worker.train(again) == 1
    assert anywhere(helper) == []


def test_a_run_that_is_told_it_as_standing_feedback_is_fenced(helper: Stack) -> None:
    sent = helper.alice.feedback(SECRET)
    helper.worker.train()
    helper.alice.feedback("next")
    lease = helper.worker.must_lease()
    assert lease.standing_feedback == [SECRET]
    helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert call(helper.worker, lease, "commit") == 409, "its commit would bring the words back"
    assert helper.worker.must_lease().standing_feedback == []
    assert anywhere(helper) == []


def test_a_run_that_has_nothing_to_do_with_it_goes_on(helper: Stack) -> None:
    helper.alice.feedback("first")
    sent = helper.alice.feedback(SECRET)
    lease = helper.worker.must_lease()
    helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert helper.worker.train(lease) == 1


def test_a_remark_that_another_item_holds_as_well_stands(helper: Stack) -> None:
    first = helper.alice.feedback("shorter")
    helper.worker.train()
    helper.alice.feedback("shorter ")
    helper.worker.train()
    helper.alice.ok("DELETE", f"/v1/feedback/{first['id']}")
    newest = helper.alice.ok("GET", "/v1/adapters/helper/versions/2")
    assert "shorter" in newest["standing_feedback"]


def test_an_answer_that_others_are_about_stays_and_is_named(helper: Stack) -> None:
    completion = secret_answer(helper)
    first, second = remark_on(helper, completion, "one"), remark_on(helper, completion, "two")
    erased = helper.alice.ok("DELETE", f"/v1/feedback/{first['id']}")
    assert (erased["completions"], erased["kept_completions"]) == ([], [completion])
    assert helper.worker.must_lease().batch_ids == [second["id"]]
    erased = helper.alice.ok("DELETE", f"/v1/feedback/{second['id']}")
    assert erased["completions"] == [completion]
    assert anywhere(helper) == []


def test_a_completion_goes_with_all_its_choices_and_every_remark_on_it(helper: Stack) -> None:
    completion = secret_answer(helper, n=3)
    sent = remark_on(helper, completion, choice=2)
    plain = helper.alice.feedback("plain")
    erased = helper.alice.ok("DELETE", f"/v1/chat/completions/{completion}")
    assert (erased["object"], erased["id"], erased["deleted"]) == ("chat.completion.deleted", completion, True)
    assert erased["perennial"]["completions"] == [completion]
    assert erased["perennial"]["cancelled_jobs"] == [sent["job_id"]]
    assert helper.count("rollouts") == 0
    assert anywhere(helper) == []
    again = helper.alice.request("DELETE", f"/v1/chat/completions/{completion}")
    error_of(again, 404, "completion_not_found")
    assert helper.worker.must_lease().batch_ids == [plain["id"]]


def test_everything_of_one_user_goes_however_it_was_said_whose_it_is(helper: Stack) -> None:
    user = f"{SECRET}@example.org/eu"
    answers = [secret_answer(helper, user=user), secret_answer(helper, safety_identifier=user, user="someone else")]
    for answer in answers:
        remark_on(helper, answer)
    message = {"model": "helper", "max_tokens": 9, "messages": [{"role": "user", "content": SECRET}]}
    helper.alice.ok("POST", "/v1/messages", message | {"metadata": {"user_id": user}})
    inline = batch(SECRET)
    inline["items"][0]["user"] = user
    helper.alice.ok("POST", "/v1/feedback", inline)
    helper.alice.chat(content="of another", user="another")
    assert f"{SECRET}@" not in json.dumps(helper.rows("SELECT person FROM rollouts"))
    assert places_of(user, helper.context.settings.data_dir) == [], "who it is was never stored"
    erased = helper.alice.ok("DELETE", "/v1/users/" + user.replace("@", "%40"))
    assert (len(erased["items"]), len(erased["completions"]), len(erased["cancelled_jobs"])) == (3, 3, 3)
    assert anywhere(helper) == []
    assert helper.count("rollouts") == 1
    assert helper.alice.ok("DELETE", "/v1/users/nobody")["items"] == []


def test_many_items_go_in_many_small_transactions(helper: Stack) -> None:
    inline = batch(*(f"{SECRET} {i}" for i in range(450)))
    sent = helper.alice.ok("POST", "/v1/feedback", inline)
    erased = helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert len(erased["items"]) == 450
    assert anywhere(helper) == []


def test_nothing_of_another_tenant_can_be_erased_or_rebuilt(helper: Stack) -> None:
    completion = secret_answer(helper, user="shared-name")
    sent = remark_on(helper, completion)
    (item,) = items_of(helper, sent["id"])
    before = helper.count("rollouts"), items_of(helper, sent["id"])
    for path, code in (
        (f"/v1/feedback/items/{item['id']}", "item_not_found"),
        (f"/v1/feedback/{sent['id']}", "batch_not_found"),
        (f"/v1/chat/completions/{completion}", "completion_not_found"),
    ):
        error_of(helper.bob.request("DELETE", path), 404, code)
    assert helper.bob.ok("DELETE", "/v1/users/shared-name")["items"] == []
    error_of(helper.bob.post("/v1/adapters/helper/rebuild"), 404, "adapter_not_found")
    assert (helper.count("rollouts"), items_of(helper, sent["id"])) == before


def test_an_erased_batch_cannot_be_brought_back_by_its_key(helper: Stack) -> None:
    sent = helper.alice.feedback(SECRET, key="k1")
    helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    for remark in (SECRET, "another"):
        answer = helper.alice.post("/v1/feedback", batch(remark), headers={"idempotency-key": "k1"})
        error_of(answer, 410, "feedback_erased")
    assert anywhere(helper) == []


def test_words_in_errors_of_its_jobs_go_too(helper: Stack) -> None:
    """A worker should not quote, and may."""
    sent = helper.alice.feedback(SECRET)
    lease = helper.worker.must_lease()
    helper.worker.call(lease, "fail", error={"code": "bad_item", "message": f"too long: {SECRET}"}, retryable=False)
    assert SECRET in helper.alice.job(sent["job_id"])["error"]["message"]
    helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert anywhere(helper) == []
    assert helper.alice.job(sent["job_id"])["status"] == "cancelled", "there is nothing to queue again"


def test_the_rewriting_waits_for_readers(helper: Stack) -> None:
    sent = helper.alice.feedback(SECRET)
    held = helper.context.database.engine.connect()
    held.exec_driver_sql("SELECT count(*) FROM feedback_items").all()  # a reader that does not end
    erased = helper.alice.ok("DELETE", f"/v1/feedback/{sent['id']}")
    assert not erased["scrubbed"]
    held.close()
    helper.converge()
    assert anywhere(helper) == []
    assert helper.count("chores") == 0


WORDS = {
    "feedback_items": {"messages", "response", "feedback", "demonstration"},
    "rollouts": {"messages", "tools", "response", "reply", "prompt_token_ids", "response_token_ids", "logprobs"},
    "versions": {"standing"},
    "jobs": {"error", "result"},
}
"""Columns that hold what users said, or may: an erasure empties them."""
WORDLESS = {
    "adapters": {"lora", "training"},
    "api_keys": {"scopes"},
    "feedback_batches": {"training"},
    "rollouts": {"sampling"},  # numbers, and stop strings of the client's program
    "runs": {"progress"},  # phase and step numbers
    "run_steps": {"metrics"},
    "versions": {"files", "training", "metrics", "items", "canary", "rejection"},
    "events": {"data"},
    "service_processes": {"asked", "holds"},
    "webhooks": {"url", "events"},  # the operator's own address
}
"""Columns of text or JSON that never do."""


def test_every_column_that_could_hold_words_is_known_to_the_erasure() -> None:
    """Whoever adds one has to say here what it holds, and erase it."""
    for table in Base.metadata.tables.values():
        wide = {
            c.name
            for c in table.columns
            if isinstance(c.type, JSON) or (isinstance(c.type, String) and (c.type.length or 10**9) > 256)
        }
        known = WORDS.get(table.name, set()) | WORDLESS.get(table.name, set())
        assert wide <= known, (table.name, wide - known)
