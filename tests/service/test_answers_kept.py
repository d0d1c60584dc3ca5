"""Answers are stored before their end is sent."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text

from tests.service.harness import Stack

MANY = 6


def test_nobody_is_answered_before_the_answer_is_stored(helper: Stack) -> None:
    asked = len(helper.engine.payloads)
    with ThreadPoolExecutor(MANY) as pool:
        with helper.context.database.write():  # nobody else can write
            calls = [pool.submit(helper.alice.chat, content=f"question {i}") for i in range(MANY)]
            until = time.monotonic() + 8
            while len(helper.engine.payloads) < asked + MANY:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert not any(call.done() for call in calls)
        ids = {call.result()["id"] for call in calls}
    with helper.context.database.read() as s:
        assert set(s.execute(text("SELECT id FROM rollouts")).scalars()) == ids
    assert len(ids) == MANY
