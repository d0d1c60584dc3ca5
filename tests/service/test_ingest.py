"""Feedback of many requests in one transaction: neighbours do not hurt each other, and exactly what came is kept."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api_schemas.feedback import FeedbackRequest
from benchmarks import ingest
from service import ingest as service_ingest
from service.db.engine import Database
from service.errors import PerennialError
from service.store import acceptance, feedback
from service.store.acceptance import Accepted, Outcome, Submission
from service.store.waiting import Limits
from tests.service.harness import Json, Stack, batch

LIMITS = Limits(adapter_jobs=1000, tenant_jobs=1000, all_jobs=1000)


def accept(stack: Stack, *sent: tuple[str, Json, str | None], limits: Limits = LIMITS) -> list[Outcome]:
    """As (tenant's name, body, key), all in one transaction."""
    ids = {row["name"]: row["id"] for row in stack.rows("SELECT id, name FROM tenants")}
    group = []
    for tenant, body, key in sent:
        request = FeedbackRequest.model_validate(body)
        group.append(Submission(ids[tenant], request, key, feedback.digest(feedback.meaning(request)), ()))
    with stack.context.database.write() as s:
        return acceptance.accept(s, group, limits)


def codes(outcomes: list[Outcome]) -> list[str]:
    return [o.code if isinstance(o, PerennialError) else "ok" for o in outcomes]


def test_each_of_a_group_gets_its_own_answer_and_refusals_leave_no_trace(helper: Stack) -> None:
    helper.bob.create("helper")
    foreign = helper.bob.chat()["id"]
    outcomes = accept(
        helper,
        ("alice", batch("one"), "a"),
        ("alice", batch("two", adapter="nobody"), "b"),
        ("alice", {"items": [{"completion_id": foreign, "feedback": "x"}]}, "c"),
        ("alice", {"items": [{"completion_id": "c" * 128, "feedback": "longer than any id"}]}, "d"),
        ("bob", batch("three"), "a"),
        ("alice", batch("four") | {"training": {"learning_rate": 0.002}, "priority": 3}, None),
        ("alice", batch("five") | {"training": {"support": "sampled"}}, None),
    )
    assert codes(outcomes) == [
        "ok", "adapter_not_found", "completion_not_found", "completion_not_found", "ok", "ok", "invalid_training",
    ]  # fmt: skip
    kept = helper.rows(
        "SELECT t.name AS tenant, j.seq, j.priority, i.feedback, e.n, e.type FROM feedback_items i"
        " JOIN jobs j ON j.batch_id = i.batch_id JOIN tenants t ON t.id = j.tenant_id"
        " JOIN events e ON e.job_id = j.id ORDER BY t.name, j.seq"
    )
    assert [tuple(row.values()) for row in kept] == [
        ("alice", 1, 0, "one", 1, "job.queued"),
        ("alice", 2, 3, "four", 2, "job.queued"),
        ("bob", 1, 0, "three", 1, "job.queued"),
    ]
    assert helper.rows("SELECT open_jobs, next_seq, events_n, priority FROM adapters ORDER BY priority DESC")[0] == {
        "open_jobs": 2, "next_seq": 3, "events_n": 2, "priority": 3,
    }  # fmt: skip
    assert helper.rows("SELECT training FROM feedback_batches WHERE CAST(training AS TEXT) LIKE '%0.002%'")


def test_the_same_key_twice_in_one_group_is_one_batch(helper: Stack) -> None:
    first, again, other, later = accept(
        helper,
        ("alice", batch("one"), "a"),
        ("alice", batch("one"), "a"),
        ("alice", batch("two"), "a"),
        ("alice", batch("one"), "b"),
    )
    assert isinstance(first, Accepted)
    assert isinstance(again, Accepted)
    assert isinstance(later, Accepted)
    assert (first.view, first.replayed, again.replayed, later.replayed) == (again.view, False, True, False)
    assert later.view.id != first.view.id
    assert codes([other]) == ["idempotency_key_reused"]
    assert (helper.count("feedback_batches"), helper.count("jobs")) == (2, 2)
    assert codes(accept(helper, ("alice", batch("one"), "a"), ("alice", batch("two"), "b"))) == [
        "ok", "idempotency_key_reused",
    ]  # fmt: skip
    assert helper.count("jobs") == 2


def test_a_key_whose_first_use_was_refused_is_free(helper: Stack) -> None:
    outcomes = accept(helper, ("alice", batch("one", adapter="nobody"), "a"), ("alice", batch("two"), "a"))
    assert codes(outcomes) == ["adapter_not_found", "ok"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(2, 99, 99), ["ok", "ok", "over_quota", "ok", "ok"]),
        (Limits(99, 3, 99), ["ok", "ok", "ok", "over_quota", "ok"]),
        (Limits(99, 99, 4), ["ok", "ok", "ok", "ok", "queue_full"]),
    ],
)
def test_what_waits_is_bounded_per_adapter_per_tenant_and_in_all(
    helper: Stack, limits: Limits, expected: list[str]
) -> None:
    helper.alice.create("other")
    helper.bob.create("helper")
    sent = [("alice", "helper")] * 3 + [("alice", "other"), ("bob", "helper")]
    outcomes = accept(helper, *((who, batch("x", adapter=name), None) for who, name in sent), limits=limits)
    assert codes(outcomes) == expected
    refused = next(o for o in outcomes if isinstance(o, PerennialError))
    assert refused.status == 429
    assert refused.retry_after is not None
    assert helper.count("jobs") == expected.count("ok")


def test_what_breaks_the_transaction_breaks_it_for_itself_alone(helper: Stack) -> None:
    """Text that is not UTF-8 slips past the checks: the neighbours are stored nevertheless."""
    requests = [FeedbackRequest.model_validate(batch(f"remark {n}")) for n in range(8)]
    broken = requests[3].items[0].model_copy(update={"feedback": "\ud800"})
    requests[3] = requests[3].model_copy(update={"items": [broken]})
    (alice,) = helper.rows("SELECT id FROM tenants WHERE name = 'alice'")
    group = [Submission(alice["id"], r, f"k{n}", "0" * 64, ()) for n, r in enumerate(requests)]

    async def together() -> list[acceptance.Accepted | acceptance.Doubtful | BaseException]:
        return await asyncio.gather(*map(helper.context.ingest.submit, group), return_exceptions=True)

    assert helper.client.portal is not None
    results = helper.client.portal.call(together)
    assert [isinstance(r, Accepted) for r in results] == [n != 3 for n in range(8)]
    assert isinstance(results[3], TypeError)
    assert [r["seq"] for r in helper.rows("SELECT seq FROM jobs ORDER BY seq")] == list(range(1, 8))


def test_long_texts_do_not_all_go_into_one_transaction(helper: Stack) -> None:
    """On the way into the database they are in memory several times over."""
    helper.alice.feedback()  # the window is known from here on

    def transactions(letters: int) -> int:
        """Of four requests that come together."""
        told = [{"role": "user", "content": "x" * letters}]
        items = [{"feedback": "shorter", "messages": told, "response": "y"}] * 15
        request = FeedbackRequest.model_validate({"adapter": "helper", "items": items})
        (alice,) = helper.rows("SELECT id FROM tenants WHERE name = 'alice'")

        async def together() -> list[Accepted]:
            sent = (service_ingest.submit(helper.context, alice["id"], request, None) for _ in range(4))
            return await asyncio.gather(*sent)

        assert helper.client.portal is not None
        ids = {accepted.view.id for accepted in helper.client.portal.call(together)}
        times = helper.rows("SELECT id, created_at FROM feedback_batches")  # one time for each transaction
        return len({row["created_at"] for row in times if row["id"] in ids})

    assert transactions(10) == 1
    assert transactions(199_000) == 2  # of 8 MiB at most


def test_two_services_take_one_key_once(helper: Stack) -> None:
    """Each on connections of its own; two bodies under one key, and one that both send."""
    (alice,) = helper.rows("SELECT id FROM tenants WHERE name = 'alice'")
    databases = [Database(helper.context.settings.db_url) for _ in range(2)]
    start = threading.Barrier(4)

    def send(at: int) -> list[Outcome]:
        outcomes = []
        for n in range(25):
            request = FeedbackRequest.model_validate(batch(f"remark {at % 2}"))
            group = [Submission(alice["id"], request, f"k{n}", feedback.digest(feedback.meaning(request)), ())]
            start.wait(30)
            with databases[at // 2].write() as s:
                outcomes += acceptance.accept(s, group, LIMITS)
        return outcomes

    with ThreadPoolExecutor(4) as pool:
        columns = list(pool.map(send, range(4)))
    for database in databases:
        database.close()
    for outcomes in zip(*columns, strict=True):
        taken = [o for o in outcomes if isinstance(o, Accepted)]
        assert sorted(codes(list(outcomes))) == ["idempotency_key_reused"] * 2 + ["ok"] * 2
        assert len({o.view.id for o in taken}) == 1
        assert sorted(o.replayed for o in taken) == [False, True]
    assert helper.count("jobs") == 25


def test_a_small_run_of_the_benchmark_keeps_exactly_what_was_sent(tmp_path: Path, database_url: str | None) -> None:
    """Real processes: the service on its own, sixteen clients, retries, duplicates, cut connections."""
    size = ingest.Size(items=400, clients=16, rounds=2, bulk_batches=16)
    with ingest.synthetic_engine() as engine:
        report = ingest.run(tmp_path, engine, size, {"PERENNIAL_DATABASE_URL": database_url} if database_url else {})
    assert report["items"] > report["distinct"] == report["stored"] == 320
    assert report["rate_per_s"] > 0


def test_the_benchmark_sends_retries_duplicates_and_cuts() -> None:
    sendings = [ingest.single(f"chatcmpl-{n}", n) for n in range(1000)]
    shares = ingest.shared_out(sendings, 16, random.Random(1))  # noqa: S311
    keys = [s.key for share in shares for s in share]
    assert len(set(keys)) == 1000
    assert 1150 < len(keys) < 1350
    assert any(s.cut for share in shares for s in share)
    both = [k for k in set(keys) if sum(k in {s.key for s in share} for share in shares) == 2]
    assert len(both) > 60
