"""All replicas of one base model, and the one way to get an answer from them: `hold`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from service.bell import Bell
from service.engine_answers import EngineAway
from service.engine_client import EngineClient
from service.errors import EngineError
from service.serving import router
from service.serving.names import served_name
from service.serving.replica import Replica

RECOVERY_SECONDS = 5.0
"""How long a request waits for a replica that is being made whole before it is answered with 503."""


@dataclass(frozen=True)
class Served:
    """Where one request is answered: this engine, under this name, until the block of `hold` is left."""

    engine: EngineClient
    name: str
    reload: Callable[[], Awaitable[None]]
    """Call when the engine says that it does not know the name, then ask again."""


@dataclass(frozen=True)
class _Wanted:
    """What one call of `hold` is after."""

    adapter_id: str | None
    n: int
    name: str
    session: str
    generates: bool
    tried: Sequence[str]


class Fleet:
    def __init__(self, replicas: Sequence[Replica], base_model: str) -> None:
        self.replicas = tuple(replicas)
        self.bell = Bell()
        """Ring when something is to be looked at now: a new head, a replica that failed."""
        self.last_asked: dict[str, float] = {}
        """Served name -> monotonic time of its last request."""
        self._base = base_model
        self._recover: Callable[[], Awaitable[None]] | None = None
        self._recovery: asyncio.Task[None] | None = None

    def on_empty(self, recover: Callable[[], Awaitable[None]]) -> None:
        """What to run, once for all who wait, when a request finds no replica up."""
        self._recover = recover

    @property
    def up(self) -> list[Replica]:
        return [r for r in self.replicas if r.up]

    @property
    def engine(self) -> EngineClient:
        """A replica for what any can answer; the first when none is up."""
        return (self.up or self.replicas)[0].engine

    async def ready(self) -> bool:
        """Whether a replica takes traffic; one that has just come is made whole first."""
        if not self.up:
            await self._wait_for_recovery()
        return bool(self.up)

    def others(self, name: str, tried: Sequence[str]) -> list[Replica]:
        """Replicas that hold this version now and are none of the tried (by URL)."""
        return [r for r in self.up if r.url not in tried and (name == self._base or name in r.loaded)]

    @asynccontextmanager
    async def hold(
        self,
        adapter_id: str | None,
        n: int,
        *,
        session: str = "",
        generates: bool = True,
        tried: list[str] | None = None,
    ) -> AsyncIterator[Served]:
        """Serve one request from version `n` of an adapter, or from the base model (`n` 0 or no adapter).

        On entry a replica is chosen (see `service.serving.router`) and has the version; it keeps it to the end of the
        block. `generates`: a block that is left without an error has had tokens from it, so it lives.
        `tried`: URLs of replicas on which this request has failed; the one that is chosen is put among them.
        Raises EngineAway when no replica is up, else as Replica.ensure_loaded.
        """
        name = served_name(adapter_id, n) if adapter_id is not None and n else self._base
        tried = [] if tried is None else tried
        async with AsyncExitStack() as stack:
            replica = await self._enter(stack, _Wanted(adapter_id, n, name, session, generates, tried))
            tried.append(replica.url)

            async def reload() -> None:
                replica.forget(name)
                if adapter_id is not None and n:
                    await replica.ensure_loaded(adapter_id, n, name)

            if name != self._base:
                self.last_asked[name] = time.monotonic()
            try:
                yield Served(replica.engine, name, reload)
            except (EngineAway, EngineError):
                self.bell.ring()  # to be looked at now: it may be dead
                raise

    async def _enter(self, stack: AsyncExitStack, wanted: _Wanted) -> Replica:
        """A replica that holds the version, in use from now on. One that turns out to be away is passed over."""
        for _ in self.replicas:
            replica = router.choose(await self._candidates(wanted), wanted.session)
            attempt = await stack.enter_async_context(AsyncExitStack())
            await attempt.enter_async_context(replica.using(wanted.name, generates=wanted.generates))
            if wanted.adapter_id is None or not wanted.n:
                return replica
            try:
                await replica.ensure_loaded(wanted.adapter_id, wanted.n, wanted.name)
            except EngineAway:
                await attempt.aclose()
                replica.down()
                self.bell.ring()
            else:
                return replica
        raise _nobody()

    async def _candidates(self, wanted: _Wanted) -> list[Replica]:
        """Replicas that have the version; where none has, those that might load it, but not for a second try."""
        await self.ready()
        found = self.others(wanted.name, wanted.tried)
        if not found and not wanted.tried:
            found = [r for r in self.up if r.refusal(wanted.name) is None] or self.up
        if not found:
            raise _nobody()
        return found

    async def _wait_for_recovery(self) -> None:
        if self._recover is None:
            return
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.ensure_future(self._recover())
        await asyncio.wait({self._recovery}, timeout=RECOVERY_SECONDS)

    def in_use(self) -> set[str]:
        """Names that some replica holds for us or runs a request on."""
        return {name for r in self.replicas for name in (*r.loaded, *r.in_flight)}

    async def known(self) -> set[str]:
        """Every name that any engine knows at this moment. Raises Unavailable unless all of them answer."""
        lists = await asyncio.gather(*(r.engine.models() for r in self.replicas))
        return self.in_use().union(*lists)

    async def close(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        for replica in self.replicas:
            await replica.engine.close()


def _nobody() -> EngineAway:
    return EngineAway("The inference engine does not answer; try again.", retry_after=2)
