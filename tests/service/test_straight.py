"""The short way from a request to its endpoint: for bodies that are as they should be, and never another answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fastapi.routing
import pytest

from service.store.keys import CLIENT_SCOPES
from tests.service.harness import Json, Stack

MESSAGES = [{"role": "user", "content": "who are you"}]
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"model": "helper", "messages": MESSAGES},
    "/v1/completions": {"model": "helper", "prompt": "who"},
    "/v1/messages": {"model": "helper", "messages": MESSAGES, "max_tokens": 9},
}
SHORT, LONG = "application/json", "application/json; charset=utf-8"
BAD = {
    "no JSON": b'{"model": ',
    "no object": b"[]",
    "too deep": b"[" * 100_000,
    "field that is missing": b"{}",
    "field of another type": b'{"model": 7}',
    "unknown field": json.dumps(BODIES["/v1/chat/completions"] | {"colour": 1}).encode(),
}


class Solved(Exception):
    """FastAPI's solver was asked."""


@pytest.fixture
def unsolved(helper: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    async def solve(**_: Any) -> Any:
        raise Solved

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", solve)
    return helper


def sent(stack: Stack, path: str, body: bytes, kind: str = SHORT, **headers: str) -> tuple[int, Json]:
    answer = stack.alice.request("POST", path, content=body, headers={"content-type": kind, **headers})
    return answer.status_code, answer.json()


def answered(found: Json) -> Json:
    """An answer without what is new in each."""
    return {k: v for k, v in found.items() if k not in ("id", "created")}


def test_a_good_body_is_answered_as_on_the_ordinary_way(helper: Stack) -> None:
    for path, body in BODIES.items():
        raw = json.dumps(body).encode()
        (status, straight), (_, ordinary) = (sent(helper, path, raw, kind) for kind in (SHORT, LONG))
        assert status == 200, straight
        assert answered(straight) == answered(ordinary)
        assert straight["id"] != ordinary["id"]


def test_the_solver_is_asked_by_the_ordinary_way_alone(unsolved: Stack) -> None:
    for path, body in BODIES.items():
        assert sent(unsolved, path, json.dumps(body).encode())[0] == 200, path
        assert sent(unsolved, path, json.dumps(body).encode(), LONG)[0] == 500, path


def test_a_bad_body_is_refused_in_the_same_words(helper: Stack) -> None:
    for path in BODIES:
        for name, body in BAD.items():
            straight, ordinary = (sent(helper, path, body, kind) for kind in (SHORT, LONG))
            assert straight == ordinary, (path, name)
            assert straight[0] in (400, 422), (path, name)


def test_a_key_that_may_not_chat_is_refused(helper: Stack) -> None:
    with helper.context.database.write() as s:
        scopes = CLIENT_SCOPES - {"chat"}
        key = helper.context.keys.create(s, tenant="alice", name="reader", scopes=scopes)
    before = helper.count("rollouts")
    for path, body in BODIES.items():
        raw = json.dumps(body).encode()
        straight, ordinary = (sent(helper, path, raw, k, authorization=f"Bearer {key}") for k in (SHORT, LONG))
        assert straight == ordinary, path
        assert straight[0] == 403, path
    assert helper.count("rollouts") == before
