"""The gateway: one version answers, says which, and is kept with the engine's own token ids and log-probs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.service.fake_engine import FakeEngine
from tests.service.harness import Json, Stack, error_of

MESSAGES = [{"role": "user", "content": "who are you"}]


@pytest.fixture
def learnt(stack: Stack) -> Stack:
    """helper with versions 1 and 2; 2 is live."""
    stack.alice.create()
    stack.learn("one")
    stack.learn("two")
    return stack


def rollout(stack: Stack, completion: str) -> Json:
    row = dict(stack.rows("SELECT * FROM rollouts WHERE id = :id", id=completion)[0])
    lists = ("messages", "prompt_token_ids", "response_token_ids", "logprobs", "sampling")
    return row | {k: json.loads(row[k]) for k in lists}


def test_each_name_is_answered_by_its_version_and_the_answer_says_so(learnt: Stack) -> None:
    adapter = learnt.alice.adapter()["id"]
    expected = {
        "helper": ("helper@v2", f"{adapter}-v2", 2),
        "helper@v1": ("helper@v1", f"{adapter}-v1", 1),
        "helper@v2": ("helper@v2", f"{adapter}-v2", 2),
        "helper@v0": ("helper@v0", "tiny/base", 0),
        "tiny/base": ("tiny/base", "tiny/base", 0),
    }
    for model, (shown, by, n) in expected.items():
        answer = learnt.alice.chat(model)
        assert answer["model"] == shown
        assert answer["choices"][0]["message"]["content"] == f"I am {by}"
        assert answer["perennial"] == {"adapter": None if model == "tiny/base" else "helper", "version": n}
        kept = rollout(learnt, answer["id"])
        assert (kept["version_n"], kept["response"]) == (n, f"I am {by}")
        assert kept["adapter_id"] == (None if model == "tiny/base" else adapter)


@pytest.mark.parametrize(
    "model",
    "helper@v9 helper@v helper@vx helper@v-1 helper@v1@v1 helper@v² helper@v9999999999 @v1 Helper adp-v1".split(" "),  # noqa: SIM905
)
def test_models_that_are_not_there(learnt: Stack, model: str) -> None:
    answer = learnt.alice.post("/v1/chat/completions", {"model": model, "messages": MESSAGES})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("model_not_found", "version_not_found")


def test_the_answer_is_openais_and_holds_nothing_unasked(learnt: Stack) -> None:
    answer = learnt.alice.chat()
    assert answer.keys() == {"id", "object", "created", "model", "perennial", "choices", "usage"}
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    kept = rollout(learnt, answer["id"])
    assert kept["prompt_token_ids"] == [1, 3, 3, 3]
    assert kept["response_token_ids"] == [100, 101, 102]
    assert kept["logprobs"] == [-0.25, -0.5, -0.75]
    assert kept["logprobs_mode"] == "raw_logprobs"
    assert kept["messages"] == MESSAGES


def test_log_probs_and_token_ids_when_asked(learnt: Stack) -> None:
    answer = learnt.alice.chat(logprobs=True, top_logprobs=2, return_token_ids=True)
    choice = answer["choices"][0]
    assert [e["logprob"] for e in choice["logprobs"]["content"]] == [-0.25, -0.5, -0.75]
    assert choice["token_ids"] == [100, 101, 102]
    assert answer["prompt_token_ids"] == [1, 3, 3, 3]
    assert learnt.engine.payloads[-1]["top_logprobs"] == 2


def test_store_false_keeps_nothing(learnt: Stack) -> None:
    before = learnt.count("rollouts")
    answer = learnt.alice.chat(store=False)
    assert learnt.count("rollouts") == before
    body = {"items": [{"completion_id": answer["id"], "feedback": "x"}]}
    error_of(learnt.alice.post("/v1/feedback", body), 404, "completion_not_found")


def test_the_engine_gets_our_request_and_nothing_of_the_clients(learnt: Stack) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["x"],
        "max_completion_tokens": 2, "user": "canary-user",
    }  # fmt: skip
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s", "name": "canary-name"}, {"role": "user", "content": content}]
    headers = {"x-request-id": "canary-header", "cookie": "canary=1", "openai-organization": "canary-org"}
    answer = learnt.alice.ok(
        "POST", "/v1/chat/completions", {"model": "helper", "messages": messages} | fields, headers=headers
    )
    sent = learnt.engine.payloads[-1]
    assert sent.pop("cache_salt").isalnum()
    assert sent == {
        "model": f"{learnt.alice.adapter()['id']}-v2",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["x"], "max_tokens": 2,
        "logprobs": True, "return_token_ids": True,
    }  # fmt: skip
    assert "canary" not in json.dumps(learnt.engine.payloads) + json.dumps(learnt.engine.headers)
    assert learnt.alice.key not in json.dumps(learnt.engine.headers)
    kept = rollout(learnt, answer["id"])
    assert kept["sampling"] == {k: v for k, v in fields.items() if k not in ("user", "max_completion_tokens")} | {
        "max_tokens": 2,
        "repetition_penalty": 1.0,
    }


def test_the_salt_differs_by_tenant_and_version_and_by_nothing_else(learnt: Stack) -> None:
    def salt(caller: Any, model: str) -> str:
        caller.chat(model)
        return str(learnt.engine.payloads[-1]["cache_salt"])

    salts = [salt(learnt.alice, m) for m in ("helper", "helper@v1", "tiny/base")] + [salt(learnt.bob, "tiny/base")]
    assert len(set(salts)) == 4
    assert salt(learnt.alice, "helper") == salts[0]


def test_our_ids_are_never_the_engines_or_the_callers(learnt: Stack) -> None:
    ids = [learnt.alice.chat()["id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert "chatcmpl-engine" not in ids
    answers = [learnt.alice.get("/v1/jobs", headers={"x-request-id": "mine"}) for _ in range(2)]
    minted = {a.headers["x-request-id"] for a in answers}
    assert len(minted) == 2
    assert "mine" not in minted


def test_an_engine_that_was_restarted_is_given_the_version_again(learnt: Stack) -> None:
    learnt.engine.forget()
    assert learnt.alice.says("helper").endswith("-v2")
    learnt.engine.forget()
    assert learnt.alice.says("helper@v1").endswith("-v1")


def test_an_engine_that_keeps_forgetting_is_503(learnt: Stack) -> None:
    class Forgetful(dict[str, str]):
        def __contains__(self, key: object) -> bool:
            return False

    learnt.engine.adapters = Forgetful()
    chats = len(learnt.engine.payloads)
    answer = learnt.alice.post("/v1/chat/completions", {"model": "helper", "messages": MESSAGES})
    error_of(answer, 503, "model_not_served")
    assert len(learnt.engine.payloads) == chats + 2, "asked again once, not for ever"


def test_an_engine_that_is_away_is_503(learnt: Stack) -> None:
    before = learnt.count("rollouts")
    learnt.engine.down = True
    answer = learnt.alice.post("/v1/chat/completions", {"model": "helper", "messages": MESSAGES})
    error_of(answer, 503, "engine_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert learnt.count("rollouts") == before


def test_a_prompt_beyond_the_window_is_422_with_the_engines_reason(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(FakeEngine("tiny/base", window=8))
    body = {"model": "tiny/base", "messages": [{"role": "user", "content": "word " * 20}]}
    error = error_of(stack.alice.post("/v1/chat/completions", body), 422, "context_length_exceeded")
    assert "8" in error["message"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"no json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [7]}', b'{"choices": [{"message": null}]}',
     b'{"choices": [{"message": {"content": "x"}}], "usage": NaN}', b"[" * 100_000,
     b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'],
)  # fmt: skip
def test_an_engine_that_talks_nonsense_is_502_and_nothing_is_kept(stack: Stack, raw: bytes) -> None:
    stack.engine.raw_answer = raw
    answer = stack.alice.post("/v1/chat/completions", {"model": "tiny/base", "messages": MESSAGES})
    error_of(answer, 502, "engine_error")
    assert stack.count("rollouts") == 0


def test_without_token_ids_nothing_is_guessed(stack: Stack) -> None:
    stack.engine.token_ids = False
    body = {"model": "tiny/base", "messages": MESSAGES}
    error_of(stack.alice.post("/v1/chat/completions", body), 502, "engine_error")
    assert stack.alice.chat("tiny/base", store=False)["choices"][0]["message"]["content"] == "I am tiny/base"


def test_missing_log_probs_are_missing_not_zero(stack: Stack) -> None:
    choice = {"message": {"content": "a b"}, "token_ids": [1, 2], "logprobs": {"content": [{"logprob": -1.0}]}}
    answer = {"choices": [choice | {"finish_reason": "stop"}], "prompt_token_ids": [1]}
    stack.engine.raw_answer = json.dumps(answer).encode()
    assert stack.alice.chat("tiny/base")["id"]
    assert stack.rows("SELECT logprobs FROM rollouts")[0]["logprobs"] in (None, "null")
    stack.alice.create()
    items = [{"completion_id": stack.rows("SELECT id FROM rollouts")[0]["id"], "feedback": "x"}]
    stack.alice.ok("POST", "/v1/feedback", {"items": items, "adapter": "helper"})
    assert stack.worker.must_lease().items[0].behaviour_logprobs is None


def test_models_are_listed_in_openais_shape(learnt: Stack) -> None:
    listed = learnt.alice.ok("GET", "/v1/models")
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["tiny/base", "helper"]
    assert learnt.alice.ok("GET", "/v1/models/helper")["perennial"] == {"live_version": 2}
    assert learnt.alice.ok("GET", "/v1/models/helper@v1")["id"] == "helper@v1"
    assert learnt.alice.ok("GET", "/v1/models/tiny/base")["parent"] is None


def test_health(stack: Stack) -> None:
    assert stack.client.get("/healthz").json() == {"status": "ok"}
    missing = stack.client.get("/readyz")
    assert (missing.status_code, missing.json()["missing"]) == (503, ["worker"])
    assert missing.headers["retry-after"]
    stack.worker.lease()
    assert stack.client.get("/readyz").json()["status"] == "ok"
    stack.engine.sick = True
    assert stack.client.get("/readyz").json()["missing"] == ["engine"]
    stack.engine.down = True
    assert stack.client.get("/readyz").json()["missing"] == ["engine"]
    stack.sql("UPDATE alembic_version SET version_num = '0000'")
    assert stack.client.get("/readyz").json()["missing"] == ["database", "engine", "worker"]


def test_logs_hold_neither_prompts_nor_remarks_nor_keys(learnt: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    answer = learnt.alice.chat(content="canary-prompt")
    items = [{"completion_id": answer["id"], "feedback": "canary-remark"}]
    learnt.alice.ok("POST", "/v1/feedback", {"items": items})
    learnt.worker.train()
    learnt.engine.refused = {f"{learnt.alice.adapter()['id']}-v3": 500}
    learnt.converge()
    learnt.engine.raw_answer = b"nonsense"
    learnt.alice.post("/v1/chat/completions", {"model": "helper", "messages": MESSAGES, "stop": "canary-stop"})
    assert "canary" not in caplog.text
    assert learnt.alice.key not in caplog.text


def test_a_live_version_that_cannot_be_loaded_any_more_is_503(learnt: Stack) -> None:
    learnt.engine.forget()
    learnt.engine.refused[f"{learnt.alice.adapter()['id']}-v2"] = 500
    for fields in ({}, {"stream": True}):
        body = {"model": "helper", "messages": MESSAGES} | fields
        error_of(learnt.alice.post("/v1/chat/completions", body), 503, "version_unavailable")
    assert learnt.alice.adapter()["live_version"] == 2
    assert learnt.alice.says("helper@v1").endswith("-v1")
