"""Junk at every route that takes a body: never a 5xx, always the one error shape, never a stack trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.harness import Caller, Json, Stack, batch

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(st.characters(exclude_categories=[]), max_size=20)
    | st.sampled_from(["helper", "helper@v1", "tiny/base", "run_0", "\x00", "..", "a" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
USER = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TALK = [*USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
ERROR = {"code": "x", "message": "y"}
COMMIT: Json = {
    "token": 1,
    "uri": "a/b",
    "files": [{"name": f"adapter/{n}", "size": 0, "sha256": "0" * 64} for n in "ab"],
    "standing_feedback": [],
    "metrics": [{"step": 1, "loss": 0.5}],
    "training_seconds": 1.0,
}
TOKEN: Json = {"text": "x", "bytes": [120], "student": -1.0, "teacher": -2.0, "effect": 0.5, "instead": None}
PREVIEW: Json = {
    "version": 0,
    "threshold": 0.5,
    "acting_share": 1.0,
    "moved_share": 1.0,
    "expected_drift": 0.5,
    "items": [
        {
            "id": "i",
            "acts": True,
            "moved_share": 1.0,
            "mean_gap": 1.0,
            "largest_gap": 1.0,
            "expected_drift": 0.5,
            "response_tokens": 1,
            "tokens": [TOKEN],
        }
    ],
}
VALID: dict[str, Json] = {
    "/v1/chat/completions": {
        "model": "helper",
        "messages": TALK,
        "temperature": 1,
        "stop": "x",
        "logprobs": True,
        "n": 2,
        "tools": TOOLS,
        "logit_bias": {"1": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    },
    "/v1/completions": {"model": "helper", "prompt": [1, 2], "logprobs": 1, "stop_token_ids": [1]},
    "/v1/messages": {
        "model": "helper",
        "max_tokens": 3,
        "tools": [{"name": "f", "input_schema": {}}],
        "system": "s",
        "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]}],
    },
    "/v1/feedback": batch("x") | {"training": {"steps": 2}, "priority": 3},
    "/v1/feedback/preview": batch("x") | {"training": {"steps": 2}},
    "/v1/adapters": {"name": "fuzzed", "lora": {"rank": 2}, "training": {"alpha": 0.5}, "on_failure": "block"},
    "/v1/adapters/{adapter}/promote": {"version": 1},
    "/v1/adapters/{adapter}/upload/commit": {"config_sha256": "0" * 64, "weights_sha256": "1" * 64},
    "/v1/jobs/{job}/cancel": {},
    "/v1/jobs/{job}/requeue": {},
    "/v1/adapters/{adapter}/pause": {},
    "/v1/adapters/{adapter}/rebuild": {"serve_meanwhile": "clean"},
    "/v1/adapters/{adapter}/resume": {},
    "/v1/webhooks": {"url": "https://hooks.example.org/x", "events": ["job.succeeded"]},
    "/v1/webhooks/{webhook}/rotate": {},
    "/v1/webhooks/{webhook}/enable": {},
    "/v1/webhooks/{webhook}/deliveries/{delivery}/redeliver": {},
    "/worker/v1/leases": {"worker_id": "w", "base_model": "tiny/base", "wait_seconds": 0},
    "/worker/v1/runs/{run_id}/heartbeat": {"token": 1, "progress": {"phase": "x"}, "metrics": [{"step": 1, "loss": 1}]},
    "/worker/v1/runs/{run_id}/commit": COMMIT,
    "/worker/v1/runs/{run_id}/result": {"token": 1, "preview": PREVIEW},
    "/worker/v1/runs/{run_id}/fail": {"token": 1, "error": ERROR, "retryable": True},
    "/worker/v1/runs/{run_id}/release": {"token": 1},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a body where something else could stand."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return junk
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = replaced(value[path[0]], path[1:], junk)
    return made


def check(caller: Caller, path: str, body: Any) -> None:
    raw = json.dumps(body)  # escapes lone surrogates, writes NaN as Python does: all of it can be sent
    answer = caller.request("POST", path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, raw, answer.text)
    if answer.status_code >= 400:
        wanted = {"code", "message", "type"} | (set() if path == "/v1/messages" else {"param"})
        assert answer.json()["error"].keys() == wanted, answer.text
        assert "Traceback" not in answer.text


def test_every_route_that_takes_a_body_is_fuzzed(stack: Stack) -> None:
    paths = stack.client.get("/openapi.json").json()["paths"]
    assert {p for p, methods in paths.items() if "post" in methods} == VALID.keys()


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_junk_is_never_our_fault(stack: Stack, data: st.DataObject) -> None:
    """A valid body with junk in one place, or junk alone."""
    if not stack.count("adapters"):
        stack.alice.create()
        stack.learn("one")
        stack.alice.feedback("two")
    template = data.draw(st.sampled_from(sorted(VALID)))
    run = stack.rows("SELECT id FROM runs ORDER BY started_at DESC LIMIT 1")[0]["id"]
    path = template.replace("{adapter}", "helper").replace("{run_id}", run).replace("{job}", "job_0")
    path = path.replace("{webhook}", "wh_0").replace("{delivery}", "msg_0")
    caller = stack.worker.caller if path.startswith("/worker") else stack.alice
    valid = VALID[template]
    place = data.draw(st.sampled_from(list(places(valid))))
    check(caller, path, replaced(valid, place, data.draw(JUNK)))


@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), junk=st.text(max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_junk_in_paths_and_queries(stack: Stack, name: str, junk: str) -> None:
    part, query = quote(name, safe=""), quote(junk.encode(errors="replace"), safe="")
    for path in (
        f"/v1/adapters/{part}/versions/1",
        f"/v1/jobs/{part}",
        f"/v1/jobs/{part}/events",
        f"/v1/webhooks/{part}",
        f"/v1/feedback/{part}",
        f"/v1/models/{part}",
        f"/v1/jobs?after={query}&limit={part}",
        f"/v1/adapters?after={query}",
    ):
        answer = stack.alice.get(path)
        assert answer.status_code < 500, (path, answer.text)
