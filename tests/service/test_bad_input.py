"""Bad input: a clear 4xx with a code, and nothing changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.service.harness import LORA, Json, Stack, batch, error_of

TABLES = ("feedback_batches", "feedback_items", "jobs", "rollouts", "adapters")


def counts(stack: Stack) -> dict[str, int]:
    return {table: stack.count(table) for table in TABLES}


def next_seq(stack: Stack) -> int:
    return int(stack.rows("SELECT next_seq FROM adapters")[0]["next_seq"])


def test_feedback_on_an_unknown_or_a_foreign_completion_is_the_same_404(helper: Stack) -> None:
    helper.bob.create("helper")
    foreign = helper.bob.chat()["id"]
    before = counts(helper)
    errors = []
    for completion in ("chatcmpl-unknown", foreign):
        body = {"items": [{"completion_id": completion, "feedback": "x"}], "adapter": "helper"}
        error = error_of(helper.alice.post("/v1/feedback", body), 404, "completion_not_found")
        errors.append({k: v.replace(completion, "ID") for k, v in error.items()})
    assert errors[0] == errors[1]
    assert errors[0]["param"] == "items.0.completion_id"
    assert counts(helper) == before


def test_a_batch_is_taken_whole_or_not_at_all(helper: Stack) -> None:
    good = helper.alice.chat()["id"]
    before, seq = counts(helper), next_seq(helper)
    body = {"items": [{"completion_id": good, "feedback": "x"}, {"completion_id": "chatcmpl-no", "feedback": "y"}]}
    error = error_of(helper.alice.post("/v1/feedback", body), 404, "completion_not_found")
    assert error["param"] == "items.1.completion_id"
    assert counts(helper) == before
    assert next_seq(helper) == seq


def test_answers_of_another_adapter_are_refused(helper: Stack) -> None:
    helper.alice.create("other")
    answer = helper.alice.chat("other")["id"]
    body = {"items": [{"completion_id": answer, "feedback": "x"}], "adapter": "helper"}
    error_of(helper.alice.post("/v1/feedback", body), 422, "adapter_mismatch")
    mixed = [{"completion_id": i, "feedback": "x"} for i in (answer, helper.alice.chat("helper")["id"])]
    error_of(helper.alice.post("/v1/feedback", {"items": mixed}), 422, "adapter_required")
    assert helper.count("jobs") == 0


CHAT = {"model": "helper", "messages": [{"role": "user", "content": "hi"}]}
INVALID, UNKNOWN = "invalid_parameter", "unknown_parameter"
BAD_BODIES: list[tuple[str, Any, str, str | None]] = [
    ("/v1/adapters", {"name": "x", "colour": "red"}, UNKNOWN, "colour"),
    ("/v1/adapters", {"name": "x", "lora": {"rnk": 3}}, UNKNOWN, "lora.rnk"),
    ("/v1/adapters", {}, "missing_parameter", "name"),
    ("/v1/adapters", {"name": "x", "lora": {"rank": "8"}}, INVALID, "lora.rank"),
    ("/v1/adapters", {"name": "x", "lora": {"rank": 8.0}}, INVALID, "lora.rank"),
    ("/v1/adapters", {"name": "x", "lora": {"rank": True}}, INVALID, "lora.rank"),
    ("/v1/adapters", {"name": "x", "lora": {"rank": 10**30}}, INVALID, "lora.rank"),
    ("/v1/adapters", {"name": "x", "base_model": "other/base"}, "unknown_base_model", "base_model"),
    ("/v1/adapters", {"name": "x", "training": {"learning_rate": 0}}, INVALID, "training.learning_rate"),
    ("/v1/adapters", {"name": "x", "training": {"support": "sampled"}}, "invalid_training", "training"),
    ("/v1/adapters", {"name": 5}, INVALID, "name"),
    *[
        ("/v1/adapters", {"name": "x", "lora": {"target_modules": [m]}}, "unknown_module", "lora.target_modules")
        for m in ("wings", "embed_tokens", "norm")
    ],
    ("/v1/adapters", {"name": "x", "lora": {"rank": 65}}, "rank_too_high", "lora.rank"),
    ("/v1/adapters", {"name": "x", "lora": {"target_modules": ["q_proj", "q_proj"]}}, INVALID, "lora"),
    *[
        ("/v1/adapters", {"name": name}, INVALID, "name")
        for name in ("", " ", "a/b", "..", "../x", "a@v1", "naïve", "A", "x" * 64, "a b", "a\n", "a\x00", "-a")
    ],
    ("/v1/feedback", {"items": []}, INVALID, "items"),
    ("/v1/feedback", {"items": [{"feedback": "x"}]}, INVALID, "items.0"),
    ("/v1/feedback", batch(""), INVALID, "items.0.feedback"),
    ("/v1/feedback", batch(" \n\t"), INVALID, "items.0.feedback"),
    ("/v1/feedback", batch("a\x00b"), INVALID, "items.0.feedback"),
    ("/v1/feedback", batch("ok", "x" * 16_001), INVALID, "items.1.feedback"),
    ("/v1/feedback", {"items": [{"completion_id": 7, "feedback": "x"}]}, INVALID, "items.0.completion_id"),
    ("/v1/feedback", {"items": [{"completion_id": "a/b", "feedback": "x"}]}, INVALID, "items.0.completion_id"),
    ("/v1/feedback", batch("x") | {"training": {"steps": 0}}, INVALID, "training.steps"),
    ("/v1/feedback", batch("x") | {"training": {"top_k": 1, "outside": "renormalise"}}, "invalid_training", "training"),
    ("/v1/chat/completions", CHAT | {"messages": []}, INVALID, "messages"),
    ("/v1/chat/completions", CHAT | {"n": 17}, INVALID, "n"),
    ("/v1/chat/completions", CHAT | {"temperature": "hot"}, INVALID, "temperature"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, INVALID, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, INVALID, "body"),
    ("/v1/chat/completions", CHAT | {"chat_template": "{{x}}"}, UNKNOWN, "chat_template"),
    ("/v1/chat/completions", CHAT | {"cache_salt": "x"}, UNKNOWN, "cache_salt"),
    ("/v1/chat/completions", CHAT | {"priority": 1}, UNKNOWN, "priority"),
]  # fmt: skip


def test_bad_bodies_are_named_and_change_nothing(helper: Stack) -> None:
    before = counts(helper)
    for path, body, code, param in BAD_BODIES:
        answer = helper.alice.post(path, body)
        assert error_of(answer, 422, code)["param"] == param, (path, body, answer.text)
    assert counts(helper) == before


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{", 400, "invalid_json"),
        (b'{"name": "\xff"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "invalid_json"),
        (b'{"name": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"", 422, "missing_parameter"),
        (b"null", 422, "invalid_parameter"),
        (b"[]", 422, "invalid_parameter"),
        (b'"text"', 422, "invalid_parameter"),
        (b"7", 422, "invalid_parameter"),
        (b'{"name": "x", "training": {"alpha": NaN}}', 422, "invalid_parameter"),
        (b'{"name": "x", "training": {"alpha": Infinity}}', 422, "invalid_parameter"),
        (b'{"name": "x", "training": {"alpha": 1e999}}', 422, "invalid_parameter"),
        (b'{"name": "\\ud800"}', 422, "invalid_parameter"),
        (b'{"name": "x", "\\ud800": 1}', 422, "invalid_parameter"),
        (b'{"name": "x", "' + b"k" * 100_000 + b'": 1}', 422, "unknown_parameter"),
    ],
)
def test_what_is_not_a_json_object_of_ours(helper: Stack, content: bytes, status: int, code: str) -> None:
    before = counts(helper)
    answer = helper.alice.request("POST", "/v1/adapters", content=content, headers={"content-type": "application/json"})
    error = error_of(answer, status, code)
    assert len(answer.content) < 1000
    assert error["message"]
    assert counts(helper) == before


def test_another_content_type_is_no_json(helper: Stack) -> None:
    body = json.dumps({"name": "x"}).encode()
    answer = helper.alice.request("POST", "/v1/adapters", content=body, headers={"content-type": "text/plain"})
    error_of(answer, 422, "invalid_parameter")


def test_a_content_length_that_is_no_number_is_refused(helper: Stack) -> None:
    for length in ("-1", "1e3", "²", "0x10"):
        headers = {"content-length": length.encode("latin-1"), "content-type": "application/json"}
        answer = helper.alice.request("POST", "/v1/adapters", content=b'{"name": "x"}', headers=headers)
        assert answer.status_code in (400, 413), answer.text
    assert helper.count("adapters") == 1


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["UP", "..", "%2e%2e", "a%2Fb", "a%00", "na%C3%AFve", "%FF", "x" * 64, "a@v1"])
def test_strange_adapter_names_in_paths(helper: Stack, method: str, name: str) -> None:
    answer = helper.alice.request(method, f"/v1/adapters/{name}")
    assert answer.status_code in (404, 405, 422), answer.text
    assert answer.json()["error"]["message"]
    assert helper.count("adapters") == 1


def test_unknown_ids_and_routes_are_404(helper: Stack) -> None:
    expected: list[tuple[str, str, Json | None, int, str]] = [
        ("GET", "/v1/feedback/fb_no", None, 404, "batch_not_found"),
        ("GET", "/v1/jobs/job_no", None, 404, "job_not_found"),
        ("POST", "/v1/jobs/job_no/cancel", None, 404, "job_not_found"),
        ("GET", "/v1/jobs?after=job_no", None, 404, "job_not_found"),
        ("GET", "/v1/adapters?after=adp_no", None, 404, "adapter_not_found"),
        ("GET", "/v1/adapters/nobody", None, 404, "adapter_not_found"),
        ("GET", "/v1/adapters/helper/versions/9", None, 404, "version_not_found"),
        ("GET", "/v1/adapters/helper/versions/0", None, 422, "invalid_parameter"),
        ("GET", "/v1/adapters/helper/versions/99999999999", None, 422, "invalid_parameter"),
        ("GET", "/v1/adapters/helper/versions/9/download", None, 404, "version_not_found"),
        ("GET", "/v1/models/nobody", None, 404, "model_not_found"),
        ("GET", "/v1/jobs/a%00b", None, 422, "invalid_parameter"),
        ("GET", "/v1/feedback/a%00b", None, 422, "invalid_parameter"),
        ("GET", "/v1/models/a%00b", None, 422, "invalid_parameter"),
        ("GET", "/v1/jobs?limit=101", None, 422, "invalid_parameter"),
        ("GET", "/v1/jobs?status=odd", None, 422, "invalid_parameter"),
        ("POST", "/v1/adapters/nobody/promote", {"version": 1}, 404, "adapter_not_found"),
        ("POST", "/v1/feedback", batch("x", adapter="nobody"), 404, "adapter_not_found"),
        ("POST", "/v1/chat/completions", CHAT | {"model": "nobody"}, 404, "model_not_found"),
        ("GET", "/v2/anything", None, 404, "route_not_found"),
        ("PUT", "/v1/adapters", {}, 405, "method_not_allowed"),
    ]
    for method, path, body, status, code in expected:
        error_of(helper.alice.request(method, path, json=body), status, code)
    assert "POST" in helper.alice.request("PUT", "/v1/adapters").headers["allow"]


def test_a_name_is_taken_once_and_free_after_deletion(helper: Stack) -> None:
    answer = helper.alice.post("/v1/adapters", {"name": "helper", "lora": LORA})
    error_of(answer, 409, "adapter_exists")
    assert answer.headers["x-should-retry"] == "false"
    old = helper.alice.adapter()["id"]
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    assert helper.alice.create()["id"] != old


def test_feedback_for_a_deleted_adapter_is_404(helper: Stack) -> None:
    answer = helper.alice.chat()["id"]
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    body = {"items": [{"completion_id": answer, "feedback": "x"}]}
    error_of(helper.alice.post("/v1/feedback", body), 404, "adapter_not_found")
