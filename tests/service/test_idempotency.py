"""One key, one batch, one job: a retry is the normal case."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx2

from tests.service.harness import Stack, batch, error_of

KEY = {"idempotency-key": "k-1"}


def test_the_same_request_twice_is_one_batch(stack: Stack) -> None:
    stack.alice.create()
    first = stack.alice.post("/v1/feedback", batch("x"), headers=KEY)
    again = stack.alice.post("/v1/feedback", batch("x"), headers=KEY)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (stack.count("feedback_batches"), stack.count("jobs"), stack.count("feedback_items")) == (1, 1, 1)


def test_order_and_white_space_do_not_make_another_body(stack: Stack) -> None:
    stack.alice.create()
    stack.alice.post("/v1/feedback", batch("x"), headers=KEY)
    shuffled = b'{ "adapter":"helper" , "items":[{"feedback":"x","standing":true,"response":"a pear",' + (
        b'"messages":[{"content":"name a fruit","role":"user"}]}]}'
    )
    headers = KEY | {"content-type": "application/json"}
    answer = stack.alice.request("POST", "/v1/feedback", content=shuffled, headers=headers)
    assert answer.headers["idempotent-replayed"] == "true"
    assert stack.count("jobs") == 1


def test_the_same_key_with_another_body_is_a_permanent_409(stack: Stack) -> None:
    stack.alice.create()
    stack.alice.post("/v1/feedback", batch("x"), headers=KEY)
    answer = stack.alice.post("/v1/feedback", batch("y"), headers=KEY)
    assert error_of(answer, 409, "idempotency_key_reused")["param"] == "Idempotency-Key"
    assert answer.headers["x-should-retry"] == "false"
    assert stack.count("jobs") == 1


def test_a_replay_is_answered_after_training_and_while_the_queue_is_full(stack: Stack) -> None:
    stack.alice.create()
    first = stack.alice.feedback(key="k-1")
    stack.worker.train()
    again = stack.alice.feedback(key="k-1")
    assert again == first | {"status": "succeeded", "version": 1}


def test_without_a_key_the_same_body_is_new_feedback(stack: Stack) -> None:
    stack.alice.create()
    assert stack.alice.feedback()["id"] != stack.alice.feedback()["id"]


def test_keys_must_be_printable(stack: Stack) -> None:
    stack.alice.create()
    for key in (b"", b"a b", b"x" * 256, "ä".encode()):
        answer = stack.alice.post("/v1/feedback", batch("x"), headers={"idempotency-key": key})
        error_of(answer, 422, "invalid_parameter")
    assert stack.count("jobs") == 0


def test_eight_threads_at_once_make_one_job(stack: Stack) -> None:
    stack.alice.create()

    def send(_: int) -> httpx2.Response:
        return stack.alice.post("/v1/feedback", batch("x"), headers=KEY)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    assert {a.status_code for a in answers} == {202}
    assert len({a.json()["id"] for a in answers}) == 1
    assert sum("idempotent-replayed" not in a.headers for a in answers) == 1
    assert (stack.count("feedback_batches"), stack.count("jobs")) == (1, 1)
    assert stack.rows("SELECT next_seq, open_jobs FROM adapters") == [{"next_seq": 2, "open_jobs": 1}]


def test_eight_threads_with_their_own_keys_get_an_order_without_gaps(stack: Stack) -> None:
    stack.alice.create()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: stack.alice.feedback(f"remark {n}", key=f"k-{n}"), range(16)))
    assert [r["seq"] for r in stack.rows("SELECT seq FROM jobs ORDER BY seq")] == list(range(1, 17))
