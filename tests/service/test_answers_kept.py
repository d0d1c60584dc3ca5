"""Answers are stored before their end is sent, those that end together in one transaction, a bad one by itself."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event, text

from service.store.rollouts import Answer
from tests.service.harness import Stack

MANY = 6
GOOD = Answer(
    id="chatcmpl-1", tenant_id="alice", adapter_id=None, base_model="base", version_n=0, messages=[], tools=None,
    response="ja", reply=None, prompt_token_ids=[1], response_token_ids=[2, 3], logprobs=[-0.5, -0.25],
    logprobs_mode="raw_logprobs", sampling={"temperature": 1.0}, finish_reason="stop",
)  # fmt: skip


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


@pytest.mark.anyio
async def test_what_ends_together_is_one_transaction_and_a_bad_answer_fails_alone(helper: Stack) -> None:
    database, inserts = helper.context.database, list[str]()

    @event.listens_for(database.engine, "before_cursor_execute")
    def _seen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO rollouts"):
            inserts.append(statement)

    with database.read() as s:
        tenant = s.execute(text("SELECT id FROM tenants WHERE name = 'alice'")).scalar_one()
    answers = [replace(GOOD, id=f"chatcmpl-{i}", tenant_id=tenant) for i in range(2 * MANY)]
    await asyncio.gather(*(helper.context.answers.submit([answer]) for answer in answers[:MANY]))
    assert len(inserts) == 1, "all were there before the first was begun"
    bad = replace(answers[MANY], logprobs=[-0.5])
    group = [[bad], *([answer] for answer in answers[MANY + 1 :])]
    ends = await asyncio.gather(*map(helper.context.answers.submit, group), return_exceptions=True)
    assert [type(end) for end in ends] == [ValueError, *[type(None)] * (MANY - 1)]
    with database.read() as s:
        kept = set(s.execute(text("SELECT id FROM rollouts")).scalars())
    assert kept == {answer.id for answer in answers} - {bad.id}
