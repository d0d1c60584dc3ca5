"""The publisher against requests, promotions and deletions that come in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from anyio.from_thread import BlockingPortal

from service.errors import NotFound
from tests.service.harness import Stack, error_of


def portal(stack: Stack) -> BlockingPortal:
    assert stack.client.portal is not None
    return stack.client.portal


@contextmanager
def slow_load(stack: Stack) -> Iterator[None]:
    """Loads hang until the block ends."""
    held = asyncio.Event()
    stack.engine.load_begun.clear()
    stack.engine.held_load = held
    try:
        yield
    finally:
        stack.engine.held_load = None
        portal(stack).call(held.set)


def test_a_request_in_flight_keeps_its_version_loaded(helper: Stack) -> None:
    helper.learn("one")
    adapter = helper.alice.adapter()["id"]
    with portal(helper).wrap_async_context_manager(helper.context.serving.hold(adapter, 1)) as held:
        helper.learn("two")
        helper.converge()
        assert helper.alice.adapter()["live_version"] == 2
        assert held.name in helper.engine.adapters
    helper.converge()
    assert held.name not in helper.engine.adapters


def test_eight_requests_for_a_version_load_it_once(helper: Stack) -> None:
    helper.learn("one")
    helper.learn("two")
    with ThreadPoolExecutor(8) as pool:
        said = set(pool.map(helper.alice.says, ["helper@v1"] * 8))
    assert said == {f"I am {helper.served(1)}"}
    assert helper.engine.events.count(("load", helper.served(1))) == 2, "once to publish it, once for all eight"


def test_a_new_version_that_arrives_during_a_promotion_does_not_win(helper: Stack) -> None:
    helper.learn("one")
    helper.learn("two")
    helper.alice.feedback("three")
    lease = helper.worker.must_lease()
    with ThreadPoolExecutor(1) as pool:
        with slow_load(helper):
            promotion = pool.submit(helper.alice.ok, "POST", "/v1/adapters/helper/promote", {"version": 1})
            assert helper.engine.load_begun.wait(10)
            assert helper.worker.train(lease) == 3, "not fenced: the promotion has not happened yet"
        assert promotion.result(10)["live_version"] == 1
    helper.converge()
    helper.converge()
    view = helper.alice.adapter()
    assert (view["live_version"], view["head_version"]) == (1, 1)
    assert helper.alice.says("helper").endswith("-v1")


def test_an_adapter_deleted_while_it_is_loaded_keeps_its_files_until_then(helper: Stack) -> None:
    helper.learn("one")
    helper.learn("two")
    adapter = helper.alice.adapter()["id"]
    with ThreadPoolExecutor(1) as pool:
        with slow_load(helper):
            promotion = pool.submit(helper.alice.post, "/v1/adapters/helper/promote", {"version": 1})
            assert helper.engine.load_begun.wait(10)
            helper.alice.ok("DELETE", "/v1/adapters/helper")
            portal(helper).call(helper.context.publisher._tidy)
            assert (helper.root / adapter).is_dir()
        error_of(promotion.result(10), 404, "adapter_not_found")
    helper.converge()
    assert helper.engine.adapters == {}
    assert not (helper.root / adapter).exists()


def test_nothing_is_kept_of_versions_that_are_gone(helper: Stack) -> None:
    for remark in ("one", "two", "three"):
        helper.learn(remark)
    (replica,) = helper.context.serving.replicas
    for kept in (replica.loaded, replica._locks, replica._last_used):
        assert set(kept) == {helper.served(3)}


def test_a_promotion_while_a_newer_version_is_loaded_wins(helper: Stack) -> None:
    helper.learn("one")
    helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    with slow_load(helper):
        helper.worker.train(lease)
        assert helper.engine.load_begun.wait(10), "the service's own pass loads version 2"
        assert helper.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})["live_version"] == 1
    helper.converge()
    view = helper.alice.adapter()
    assert (view["live_version"], view["head_version"]) == (1, 1)
    assert helper.alice.ok("GET", "/v1/adapters/helper/versions/2")["status"] == "pending"


def test_a_deleted_adapter_is_not_loaded_again(helper: Stack) -> None:
    """By a request that found it alive and comes to the engine late: the files may go at any moment."""
    helper.learn("one")
    adapter, name = helper.alice.adapter()["id"], helper.served(1)
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    helper.converge()
    with pytest.raises(NotFound):
        portal(helper).call(helper.context.serving.replicas[0].ensure_loaded, adapter, 1, name)
    assert helper.engine.adapters == {}
