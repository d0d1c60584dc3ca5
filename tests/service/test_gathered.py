"""Work that is gathered: each gets its own result, a bad one fails alone, what was taken is finished."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from service.errors import NotFound, TooMany, Unavailable
from service.gathered import Gathered


class Work:
    """Doubles numbers. Negative ones are refused; zero breaks the whole group; a closed gate holds the thread."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, group: Sequence[int]) -> list[int | Exception]:
        self.groups.append(list(group))
        self.gate.wait(10)
        if 0 in group:
            raise ZeroDivisionError("nothing of this group was done")
        return [NotFound(f"{n} is not there") if n < 0 else 2 * n for n in group]


async def held(work: Work, gathered: Gathered[int, int], *members: int) -> list[asyncio.Task[int]]:
    """The first is being done, behind the closed gate; the others wait."""
    work.gate.clear()
    first, *others = members
    tasks = [asyncio.create_task(gathered.submit(first))]
    while not work.groups:
        await asyncio.sleep(0)
    tasks += [asyncio.create_task(gathered.submit(n)) for n in others]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.anyio
async def test_one_alone_is_done_at_once_and_what_comes_meanwhile_is_one_group() -> None:
    work = Work()
    gathered = Gathered("test", work, most=100, room=100)
    tasks = await held(work, gathered, 1, 2, 3, 4)
    work.gate.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
    assert work.groups == [[1], [2, 3, 4]]
    await gathered.close()


@pytest.mark.anyio
async def test_a_refusal_and_a_breakdown_are_their_own_members_alone() -> None:
    work = Work()
    gathered = Gathered("test", work, most=100, room=100)
    tasks = await held(work, gathered, 1, -2, 3, 0, 5)
    work.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [int, NotFound, int, ZeroDivisionError, int]
    assert work.groups == [[1], [-2, 3, 0, 5], [-2], [3], [0], [5]]
    await gathered.close()


@pytest.mark.anyio
async def test_groups_and_what_waits_are_bounded_by_weight() -> None:
    work = Work()
    gathered = Gathered("test", work, most=5, room=9)
    tasks = await held(work, gathered, 1)
    tasks += [asyncio.create_task(gathered.submit(n, weight)) for n, weight in ((2, 4), (3, 4), (4, 1))]
    await asyncio.sleep(0)
    with pytest.raises(TooMany) as refused:
        await gathered.submit(5, 1)
    assert (refused.value.code, refused.value.retry_after) == ("service_busy", 1)
    work.gate.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
    assert work.groups == [[1], [2], [3, 4]]
    assert await gathered.submit(6, 50) == 12  # larger than any group, but nothing waits
    await gathered.close()


@pytest.mark.anyio
async def test_closing_finishes_what_was_taken_and_refuses_what_comes_after() -> None:
    work = Work()
    gathered = Gathered("test", work, most=1, room=100)
    tasks = await held(work, gathered, 1, 2, 3)
    closing = asyncio.create_task(gathered.close())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        await gathered.submit(4)
    assert refused.value.code == "stopping"
    work.gate.set()
    await closing
    assert [t.result() for t in tasks] == [2, 4, 6]
    await gathered.close()


@pytest.mark.anyio
async def test_whoever_goes_away_leaves_the_others_their_answers() -> None:
    work = Work()
    gathered = Gathered("test", work, most=100, room=100)
    tasks = await held(work, gathered, 1, 2, 3)
    tasks[0].cancel()
    tasks[1].cancel()
    work.gate.set()
    assert await tasks[2] == 6
    assert work.groups == [[1], [2, 3]]  # taken is taken
    await gathered.close()


@pytest.mark.anyio
async def test_work_is_done_where_no_thread_can_be_started_any_more() -> None:
    gathered = Gathered("test", Work(), most=100, room=100)
    usual = threading.stack_size(2**46)  # more than there is
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=int).start()
        async with asyncio.timeout(10):
            assert await gathered.submit(1) == 2
    finally:
        threading.stack_size(usual)
    await gathered.close()


async def alone_then_together(work: Work, gathered: Gathered[int, int]) -> None:
    """A group of one, then one of three."""
    tasks = await held(work, gathered, 1, 2, 3, 4)
    work.gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.anyio
async def test_a_group_waits_for_company_where_there_was_some_before() -> None:
    work = Work()
    gathered = Gathered("test", work, most=100, room=100, patience=60.0)
    await alone_then_together(work, gathered)
    tasks = []
    for n in (5, 6, 7):
        assert len(work.groups) == 2  # nobody has been done yet
        tasks.append(asyncio.create_task(gathered.submit(n)))
        await asyncio.sleep(0.01)
    assert await asyncio.gather(*tasks) == [10, 12, 14]
    assert work.groups == [[1], [2, 3, 4], [5, 6, 7]]
    await gathered.close()


@pytest.mark.anyio
async def test_patience_ends_and_closing_ends_it() -> None:
    work = Work()
    gathered = Gathered("test", work, most=100, room=100, patience=0.01)
    await alone_then_together(work, gathered)
    assert await gathered.submit(5) == 10  # after a while, with nobody
    assert await gathered.submit(6) == 12
    await gathered.close()
    gathered = Gathered("test", work, most=100, room=100, patience=3600.0)
    work.groups.clear()
    await alone_then_together(work, gathered)
    waiting = asyncio.create_task(gathered.submit(7))
    await asyncio.sleep(0.01)
    await gathered.close()
    assert await waiting == 14
