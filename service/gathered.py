"""Many small pieces of work done as one: while one group is being done, the next one gathers.

At one request a time a group has one member and nothing waits; under load the cost of a transaction (its thread, its
statements, the disk's sync) is shared. The rules that make it safe:

* A member's answer is set only after `do` has returned for its group, so what `do` commits is durable by then.
* A group whose `do` raises has done nothing; each of its members is then tried alone, so a bad one fails by itself.
* What has been taken is finished before `close` returns; what comes after is refused. Nothing is dropped silently.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from service.errors import PerennialError, TooMany, Unavailable

T = TypeVar("T")
R = TypeVar("R")


class Gathered(Generic[T, R]):
    """Calls `do` with groups of at most `most` in weight, on one thread; at most `room` in weight may wait."""

    def __init__(
        self,
        name: str,
        do: Callable[[Sequence[T]], Sequence[R | Exception]],
        *,
        most: int,
        room: int,
        patience: float = 0.0,
    ):
        """`do` gives one result per member, in order; an exception among them is that member's alone.

        `patience`, seconds: most that a group waits to become as large as the one before it. Whoever was answered with
        that one is likely to come again at once, and half as many groups cost half as much.
        """
        self._do = do
        self._most, self._room, self._patience = most, room, patience
        self._last = 1
        """Members of the group before."""
        self._enough = asyncio.Event()
        self._waiting: deque[tuple[T, int, asyncio.Future[R]]] = deque()
        self._weight = 0
        self._working: asyncio.Task[None] | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._thread.submit(int)  # started now: where there is none to be had later, what was taken would wait for ever

    async def submit(self, member: T, weight: int = 1) -> R:
        """The member's own result. Raises its own error, TooMany when too much waits, Unavailable after `close`."""
        if self._closed:
            raise Unavailable("The service is stopping; try again.", code="stopping", retry_after=2)
        if self._waiting and self._weight + weight > self._room:
            raise TooMany("Too much waits to be stored: send it again later.", code="service_busy", retry_after=1)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((member, weight, future))
        self._weight += weight
        if len(self._waiting) >= self._last:
            self._enough.set()
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        """Finish what was taken. Safe to repeat."""
        self._closed = True
        self._enough.set()
        if self._working is not None:
            await self._working
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._company()
            members, futures = self._next_group()
            self._last = len(members)
            for future, result in zip(
                futures, await loop.run_in_executor(self._thread, self._results, members), strict=True
            ):
                if future.done():  # whoever asked has been cancelled
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._working = None

    async def _company(self) -> None:
        if self._patience and not self._closed and len(self._waiting) < self._last:
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await self._enough.wait()

    def _next_group(self) -> tuple[list[T], list[asyncio.Future[R]]]:
        members: list[T] = []
        futures: list[asyncio.Future[R]] = []
        heavy = 0
        while self._waiting and (not members or heavy + self._waiting[0][1] <= self._most):
            member, weight, future = self._waiting.popleft()
            members.append(member)
            futures.append(future)
            heavy += weight
        self._weight -= heavy
        return members, futures

    def _results(self, members: Sequence[T]) -> Sequence[R | Exception]:
        try:
            return self._do(members)
        except PerennialError as error:  # such as a database that is away: for all of them alike
            return [error] * len(members)
        except Exception as error:
            if len(members) == 1:
                return [error]
            return [result for member in members for result in self._results([member])]
