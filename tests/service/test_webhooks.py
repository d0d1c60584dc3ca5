"""Webhooks: signed, at least once, to where they may go, each endpoint at its own pace."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from typing import get_args

import pytest

from api_schemas.webhooks import EventName
from service.errors import Unprocessable
from service.store import deliveries, events
from service.store.deliveries import Result
from service.webhooks import signing
from service.webhooks.guard import Policy, Refused
from tests.service.harness import Caller, Json, Stack, error_of
from tests.service.receiver import Got, Receiver, receiver

OPEN = {"webhook_hosts": "localhost", "webhook_allow_private": True, "webhook_backoff_seconds": 0.01}


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


@pytest.fixture
def hooked(make_stack: Callable[..., Stack]) -> Stack:
    hooked = make_stack(**OPEN)
    hooked.alice.create()
    return hooked


def endpoint(caller: Caller, hook: Receiver, **fields: object) -> Json:
    return caller.ok("POST", "/v1/webhooks", {"url": hook.url} | fields)


def verified(got: Got, secret: str) -> Json:
    """As a receiver does it, by the specification alone."""
    signed = f"{got.headers['webhook-id']}.{got.headers['webhook-timestamp']}.".encode() + got.body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    wanted = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert wanted in got.headers["webhook-signature"].split(" ")
    assert abs(time.time() - int(got.headers["webhook-timestamp"])) < 300
    return dict(json.loads(got.body))


def settled(hooked: Stack, webhook: Json, state: str, count: int) -> list[Json]:
    """Deliveries of this state, once there are so many."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        page = hooked.alice.ok("GET", f"/v1/webhooks/{webhook['id']}/deliveries?state={state}&limit=100")
        if len(page["data"]) >= count:
            return list(page["data"])
        time.sleep(0.02)
    raise AssertionError(f"not {count} {state}: {page}")


def test_the_signature_is_that_of_the_specifications_own_example() -> None:
    made = signing.signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_events_that_can_be_asked_for_are_those_that_there_are() -> None:
    assert set(get_args(EventName)) == set(get_args(events.EventType))


def test_what_happens_from_now_on_arrives_signed(hooked: Stack, hook: Receiver) -> None:
    hooked.alice.feedback("before")
    made = endpoint(hooked.alice, hook)
    job = hooked.alice.feedback("after")["job_id"]
    got = hook.next()
    body = verified(got, made["secret"])
    assert (got.path, got.headers["host"]) == ("/hook", f"localhost:{hook.port}")
    assert body["type"] == "job.queued"
    assert body["data"] == {
        "adapter": "helper", "adapter_id": hooked.alice.adapter()["id"], "job_id": job,
        "data": {"why": "new", "attempts": 0},
    }  # fmt: skip
    (delivered,) = settled(hooked, made, "delivered", 1)
    assert delivered["id"] == got.headers["webhook-id"]
    assert (delivered["attempts"], delivered["status"], delivered["job_id"]) == (1, 204, job)


def test_only_the_events_asked_for_and_only_ones_own(hooked: Stack, hook: Receiver) -> None:
    made = endpoint(hooked.alice, hook, events=["job.succeeded"])
    hooked.bob.create("helper")
    hooked.bob.feedback()
    hooked.alice.create("second")  # made after the webhook
    job = hooked.alice.feedback(adapter="second")["job_id"]
    for _ in range(2):
        hooked.worker.train()
    body = verified(hook.next(), made["secret"])
    assert (body["type"], body["data"]["job_id"], body["data"]["version"]) == ("job.succeeded", job, 1)
    assert len(settled(hooked, made, "delivered", 1)) == 1
    assert hook.got.empty()


def test_a_failure_is_tried_again_under_the_same_id_with_the_same_body(hooked: Stack, hook: Receiver) -> None:
    hook.answers += [(500, {}), (302, {"location": hook.url}), (429, {"retry-after": "1"})]
    made = endpoint(hooked.alice, hook)
    hooked.alice.feedback()
    tries = [hook.next() for _ in range(4)]
    assert len({t.headers["webhook-id"] for t in tries}) == 1
    assert len({t.body for t in tries}) == 1
    for each in tries:
        verified(each, made["secret"])
    (delivered,) = settled(hooked, made, "delivered", 1)
    assert delivered["attempts"] == 4


def test_an_attempt_whose_process_died_before_it_was_written_down_is_made_again(hooked: Stack, hook: Receiver) -> None:
    """As kill -9 between the receiver's answer and our record leaves it: begun, and nothing more."""
    hook.gate.clear()
    made = endpoint(hooked.alice, hook)
    hooked.alice.feedback()
    first = hook.next()
    assert settled(hooked, made, "pending", 1)[0]["attempts"] == 1
    # Whoever made the attempt is gone, and its time is over.
    hooked.sql("UPDATE webhook_deliveries SET due_at = 0")
    with hooked.context.database.write() as s:
        (again,) = deliveries.begin(s, busy=[], limit=9)
    assert (again.id, again.attempt) == (first.headers["webhook-id"], 2)
    hook.gate.set()  # the first one was not dead after all: what it writes down comes too late
    hooked.client.get("/healthz")
    with hooked.context.database.write() as s:
        deliveries.record(s, again, Result(503), 0.01)
    second = hook.next()
    assert second.headers["webhook-id"] == first.headers["webhook-id"]
    assert settled(hooked, made, "delivered", 1)[0]["attempts"] == 3


def test_what_nobody_takes_is_dead_can_be_seen_and_sent_again(
    hooked: Stack, hook: Receiver, make_stack: Callable[..., Stack]
) -> None:
    made = endpoint(hooked.alice, hook)
    hooked.alice.feedback()
    hook.next()
    settled(hooked, made, "delivered", 1)
    with hooked.context.database.write() as s:
        s.connection().exec_driver_sql("UPDATE webhook_deliveries SET state = 'pending', attempts = 9, due_at = 0")
    hook.answers.append((500, {}))
    hook.next()
    (dead,) = settled(hooked, made, "dead", 1)
    assert (dead["attempts"], dead["status"]) == (10, 500)
    assert hooked.alice.ok("GET", f"/v1/webhooks/{made['id']}")["dead"] == 1
    hooked.alice.ok("POST", f"/v1/webhooks/{made['id']}/deliveries/{dead['id']}/redeliver")
    assert hook.next().headers["webhook-id"] == dead["id"]
    settled(hooked, made, "delivered", 1)


def test_410_ends_an_endpoint_until_it_is_enabled_again(hooked: Stack, hook: Receiver) -> None:
    hook.answers.append((410, {}))
    made = endpoint(hooked.alice, hook)
    hooked.alice.feedback("one")
    hook.next()
    settled(hooked, made, "dead", 1)
    found = hooked.alice.ok("GET", f"/v1/webhooks/{made['id']}")
    assert (found["status"], found["disabled_reason"]) == ("disabled", "gone")
    second = hooked.alice.feedback("two")["job_id"]
    assert hooked.alice.ok("POST", f"/v1/webhooks/{made['id']}/enable")["status"] == "active"
    assert json.loads(hook.next().body)["data"]["job_id"] == second


def test_a_slow_endpoint_holds_up_no_other(hooked: Stack, hook: Receiver) -> None:
    hook.gate.clear()
    slow = endpoint(hooked.alice, hook)
    with receiver() as quick:
        other = endpoint(hooked.alice, quick)
        for n in range(8):
            hooked.alice.feedback(str(n))
        settled(hooked, other, "delivered", 8)
    assert len(settled(hooked, slow, "pending", 8)) == 8


def test_a_rotated_secret_signs_beside_the_old_one_for_a_day(hooked: Stack, hook: Receiver) -> None:
    made = endpoint(hooked.alice, hook)
    new = hooked.alice.ok("POST", f"/v1/webhooks/{made['id']}/rotate")["secret"]
    assert new != made["secret"]
    hooked.alice.feedback("one")
    got = hook.next()
    verified(got, made["secret"])
    verified(got, new)
    hooked.sql("UPDATE webhooks SET rotated_at = rotated_at - 86401")
    hooked.alice.feedback("two")
    got = hook.next()
    verified(got, new)
    with pytest.raises(AssertionError):
        verified(got, made["secret"])


def test_endpoints_belong_to_their_tenant_and_go_when_deleted(hooked: Stack, hook: Receiver) -> None:
    made = endpoint(hooked.alice, hook)
    path = f"/v1/webhooks/{made['id']}"
    assert "secret" not in {k for k, v in hooked.alice.ok("GET", path).items() if v is not None}
    for method, route in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/rotate"),
        ("POST", "/enable"),
        ("GET", "/deliveries"),
    ):
        error_of(hooked.bob.request(method, path + route), 404, "webhook_not_found")
    assert hooked.bob.ok("GET", "/v1/webhooks")["data"] == []
    hooked.alice.feedback()
    hook.next()
    settled(hooked, made, "delivered", 1)
    assert hooked.alice.ok("DELETE", path)["deleted"]
    assert hooked.alice.ok("GET", "/v1/webhooks")["data"] == []
    assert [hooked.count(t) for t in ("webhooks", "webhook_cursors", "webhook_deliveries")] == [0, 0, 0]


def test_no_secret_is_in_the_database(hooked: Stack, hook: Receiver) -> None:
    secret = endpoint(hooked.alice, hook)["secret"].removeprefix("whsec_")
    rows = str([hooked.rows(f"SELECT * FROM {t}") for t in ("webhooks", "webhook_cursors", "webhook_deliveries")])  # noqa: S608
    assert "localhost" in rows
    assert secret not in rows
    assert base64.b64decode(secret).hex() not in rows


def test_off_until_the_operator_names_hosts(make_stack: Callable[..., Stack], hook: Receiver) -> None:
    hooked = make_stack()
    answer = hooked.alice.post("/v1/webhooks", {"url": "https://example.org/hook"})
    assert error_of(answer, 422, "webhooks_off")["param"] == "url"


STRICT = Policy(("example.org", "*.example.net"), private=False)


@pytest.mark.parametrize("url", ["https://example.org/x?y=1", "https://EXAMPLE.org:8443", "https://a.b.example.net/"])
def test_urls_that_are_taken(url: str) -> None:
    STRICT.check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org", "ftp://example.org", "//example.org", "example.org", "https://", "https://user@example.org",
        "https://example.org#x", "https://example.org:99999", "https://example.org/a b", "https://exämple.org",
        "https://example.net", "https://evilexample.net", "https://example.org.evil.com", "https://127.0.0.1",
        "https://[::1]/", "https://[", "https://example.org\r\nx: y", "https://example.org\\@evil.com",
    ],
)  # fmt: skip
def test_urls_that_are_not(url: str) -> None:
    with pytest.raises(Unprocessable):
        STRICT.check_url(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",  # noqa: S104
        "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1",
        "fe80::1%eth0",
    ],
)  # fmt: skip
def test_addresses_that_are_not_the_public_internets(address: str) -> None:
    with pytest.raises(Refused):
        STRICT.check_address(address)
    Policy(("*",), private=True).check_address(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    STRICT.check_address(address)


def test_a_name_that_turns_out_to_be_private_is_refused_when_it_is_sent(
    make_stack: Callable[..., Stack], hook: Receiver
) -> None:
    """`localhost` passes the list of names, and its address fails: nothing is connected to."""
    hooked = make_stack(**OPEN | {"webhook_allow_private": False, "webhook_backoff_seconds": 3600})
    hooked.alice.create()
    made = hooked.alice.ok("POST", "/v1/webhooks", {"url": f"https://localhost:{hook.port}/hook"})
    hooked.alice.feedback()
    until = time.monotonic() + 20
    while not (found := settled(hooked, made, "pending", 1)[0])["error"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "not a public address" in found["error"]
    assert hook.got.empty()
