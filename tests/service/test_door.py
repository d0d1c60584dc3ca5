"""Feedback's own way in answers as the ordinary route does, and leaves it all that is not plain and right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import httpx2
import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from service.door import FeedbackDoor
from service.gathered import Gathered
from service.store.acceptance import Accepted, Doubtful, Submission
from tests.service.harness import Caller, Stack, batch, error_of
from tests.service.test_fuzz import places, replaced

REPLAYED = {"idempotent-replayed"}
DOOR, ROUTE = "application/json", "application/json; charset=utf-8"
"""A media type with a parameter is JSON too, but not plain."""
TWICE = b'{"items": [], "items": [{"feedback": "x", "messages": [{"role": "user", "content": "a"}], "response": "b"}],'
BODIES = (
    TWICE + b'"adapter": "nobody", "adapter": "helper"}',
    json.dumps(batch("x")).encode("utf-16"),
    b"\xef\xbb\xbf" + json.dumps(batch("x")).encode(),
    json.dumps(batch("x")).encode() + b" \n",
    json.dumps(batch("x")).encode() + b"x",
    json.dumps(batch("\u00e4\U0001f600")).encode(),
    json.dumps(batch("\ud800")).encode(),
    json.dumps(batch("x") | {"training": {"alpha": float("nan")}}).encode(),
    json.dumps(batch("x") | {"training": {"alpha": 1, "learning_rate": 1e-4}}).encode(),
    json.dumps(batch("x") | {"priority": 1.0}).encode(),
    b'{"items": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"\xff",
    b"",
)


JUNK = (None, True, 0, 2**70, 2.0, float("inf"), "7", "a\x00b", "\ud800", "a" * 300, [], {}, ["x"], {"x": 1})


def fuzzed() -> Iterator[bytes]:
    """A batch with something else in each of its places; of all such bodies every third."""
    body = batch("x") | {"training": {"steps": 2, "alpha": 0.5}, "priority": 3}
    made = [replaced(body, path, junk) for path in places(body) for junk in JUNK]
    yield from (json.dumps(b).encode() for b in made[::3])


def sent(caller: Caller, body: bytes, kind: str, key: str) -> httpx2.Response:
    return caller.request("POST", "/v1/feedback", content=body, headers={"content-type": kind, "idempotency-key": key})


def test_both_ways_give_the_same_answer(helper: Stack) -> None:
    """What is accepted means the same: under one key it is the same batch, whichever way it comes."""
    accepted = 0
    for n, body in enumerate([*BODIES, *fuzzed()]):
        first, other = (DOOR, ROUTE) if n % 2 else (ROUTE, DOOR)
        one, two = sent(helper.alice, body, first, f"k{n}"), sent(helper.alice, body, other, f"k{n}")
        assert one.status_code == two.status_code, (body, one.text, two.text)
        assert one.json() == two.json(), body
        assert one.headers.keys() - REPLAYED == two.headers.keys() - REPLAYED
        accepted += one.status_code == 202
        assert ("idempotent-replayed" in two.headers) == (one.status_code == 202)
    assert accepted == helper.count("jobs") > 5


@pytest.mark.parametrize("headers", [{"authorization": "Bearer pk_nobody"}, {"idempotency-key": "with space"}, {}])
def test_what_is_not_plain_goes_the_ordinary_way_unread(helper: Stack, headers: dict[str, str]) -> None:
    reached = []

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    client = TestClient(FeedbackDoor(route, helper.context))
    plain = {"authorization": f"Bearer {helper.alice.key}", "content-type": "application/json"}
    body = json.dumps(batch("x")).encode()
    for path, more in (("/v1/feedback", headers or {"content-type": "text/plain"}), ("/v1/feedback/", {})):
        answer = client.post(path, content=body, headers=plain | more)
        assert (answer.status_code, reached.pop()) == (299, body)
    answer = client.post("/v1/feedback", content=b"{}", headers=plain)
    assert (answer.status_code, reached.pop()) == (299, b"{}")  # read, found wrong, and there again
    assert helper.count("jobs") == 0


def test_what_is_plain_and_right_never_reaches_it(helper: Stack) -> None:
    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope["path"])

    headers = {"authorization": f"Bearer {helper.alice.key}"}
    body = json.dumps(batch("x")).encode()
    pieces = [body[:9], body[9:]]

    async def post() -> tuple[int, list[bytes]]:
        """In pieces, on the loop of the service."""
        raw = [(b"authorization", headers["authorization"].encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/feedback", "headers": raw}
        messages = [{"type": "http.request", "body": p, "more_body": p is pieces[0]} for p in pieces]
        answers: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return messages.pop(0)

        async def send(message: object) -> None:
            assert isinstance(message, dict)
            answers.append(message)

        await FeedbackDoor(route, helper.context)(scope, receive, send)
        return int(str(answers[0]["status"])), [bytes(a["body"]) for a in answers[1:] if isinstance(a["body"], bytes)]

    assert helper.client.portal is not None
    status, answer = helper.client.portal.call(post)
    assert (status, json.loads(b"".join(answer))["item_count"]) == (202, 1)
    assert helper.count("jobs") == 1


def test_a_defect_of_ours_is_a_500_that_says_nothing_of_it(helper: Stack) -> None:
    def broken(_: Sequence[Submission]) -> list[Accepted | Doubtful | Exception]:
        raise ZeroDivisionError("of ours")

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope["path"])

    gathered = Gathered("broken", broken, most=1, room=1)
    client = TestClient(FeedbackDoor(route, replace(helper.context, ingest=gathered)))
    answer = client.post("/v1/feedback", json=batch("x"), headers={"authorization": f"Bearer {helper.alice.key}"})
    error_of(answer, 500, "internal_error")
    assert "of ours" not in answer.text
    assert helper.count("jobs") == 0
    asyncio.run(gathered.close())


def test_the_key_must_be_allowed_to_send_feedback(helper: Stack) -> None:
    with helper.context.database.write() as s:
        reader = helper.context.keys.create(s, tenant="alice", name="r", scopes={"jobs:read"})
    error_of(Caller(helper.client, reader).post("/v1/feedback", batch("x")), 403, "missing_scope")
    error_of(helper.worker.caller.post("/v1/feedback", batch("x")), 403, "missing_scope")
    assert helper.count("jobs") == 0
