"""One engine: what it has loaded, what runs on it, and whether it may take traffic.

Nothing here is truth: a pass of the publisher compares it with the engine's own list. An engine takes traffic only
after it has generated a token and holds every live version, so one that was restarted is first made whole.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from service.engine_answers import EngineAway, LoadRefused
from service.engine_client import EngineClient
from service.errors import EngineError, PerennialError, Unavailable, VersionRejected
from service.serving import canary
from service.serving.artifacts import Artifact, Artifacts
from service.serving.names import PREFIX
from service.settings import Settings

REFUSAL_SECONDS = 60.0
"""A load that was refused for good is not tried again for so long; a restart of the engine ends the wait."""


class Replica:
    def __init__(self, url: str, engine: EngineClient, artifacts: Artifacts, settings: Settings, base: str) -> None:
        self.url = url
        self.engine = engine
        self.up = False
        """It generates, and holds all live versions."""
        self.loaded: set[str] = set()
        self.in_flight: Counter[str] = Counter()
        self.turn = asyncio.Lock()
        """Held during a pass over this replica."""
        self._artifacts = artifacts
        self._settings = settings
        self._base = base
        self._refused: dict[str, tuple[VersionRejected, float]] = {}
        self._last_used: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._generated_at = -1e9

    @property
    def load(self) -> int:
        """Requests that run or wait on it."""
        return self.in_flight.total()

    def refusal(self, name: str) -> VersionRejected | None:
        """Why this engine will not have the version, if it said so lately."""
        error, until = self._refused.get(name, (None, 0.0))
        return error if time.monotonic() < until else None

    @asynccontextmanager
    async def using(self, name: str, *, generates: bool) -> AsyncIterator[None]:
        """A request runs on `name`: it is not unloaded meanwhile. How the request ends says how the engine is."""
        self.in_flight[name] += 1
        try:
            yield
            if generates:
                self._generated_at = time.monotonic()
        except EngineAway:
            self.down()
            raise
        except EngineError:
            self._generated_at = -1e9  # the next pass must see a token before it believes in this engine
            raise
        finally:
            self.in_flight[name] -= 1
            if not self.in_flight[name]:
                del self.in_flight[name]
            self._last_used[name] = time.monotonic()

    def down(self) -> None:
        """No traffic before the next pass has seen it whole."""
        self.up = False
        self._generated_at = -1e9

    def forget(self, name: str) -> None:
        """The engine says that it does not know this name: load it again before the next use."""
        self.loaded.discard(name)

    async def observe(self) -> set[str]:
        """Names of ours that the engine knows. What it has lost is noted: then it was restarted.

        Ours is what lies in our own adapters directory: another service may share the engine, under names like ours.
        """
        ours = f"{self._settings.engine_adapters_root}/"
        models = await self.engine.models()
        known = {n for n, m in models.items() if n.startswith(PREFIX) and str(m.get("root")).startswith(ours)}
        if self.loaded - known:
            self.down()
            self._refused.clear()
            self.loaded &= known
        return known

    async def check_generates(self) -> None:
        """Raises Unavailable or EngineError unless it has generated lately or generates one token now.

        /health says 200 also when nothing behind it lives any more.
        """
        if time.monotonic() - self._generated_at > self._settings.probe_seconds:
            await self.engine.probe(self._base)
            self._generated_at = time.monotonic()

    async def ensure_loaded(self, adapter_id: str, n: int, name: str) -> None:
        """Load a version unless it is. Raises Unavailable, NotFound, Gone, VersionRejected."""
        if name in self.loaded:
            return
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self.loaded:
                return
            if (refused := self.refusal(name)) is not None:
                raise VersionRejected(refused.message, code=refused.code)
            try:
                await self._load(await self._artifacts.checked(adapter_id, n))
            except VersionRejected as error:
                self._refused[name] = (error, time.monotonic() + REFUSAL_SECONDS)
                raise
            self._last_used[name] = time.monotonic()
            self.loaded.add(name)

    async def _load(self, artifact: Artifact) -> None:
        try:
            await self.engine.load(artifact.name, artifact.path)
        except LoadRefused as first:
            # A dying engine fails in the same way as a bad adapter: ask again before the verdict.
            if not await self.engine.healthy():
                raise Unavailable("The engine is not well; try again.", code="engine_unavailable") from first
            try:
                await self.engine.load(artifact.name, artifact.path)
            except LoadRefused as second:
                raise VersionRejected(f"engine_refused: {second}") from second
        try:
            await self._examine(artifact)
        except BaseException:
            with suppress(PerennialError):  # else the next pass does it
                await self.engine.unload(artifact.name)  # nobody has been answered by it
            raise

    async def _examine(self, artifact: Artifact) -> None:
        try:
            await canary.check(self.engine, artifact, self._settings)
        except EngineError as error:
            await self.engine.probe(self._base)  # it lives: then the version is at fault
            raise VersionRejected(f"canary: the engine cannot answer with it: {error}", code="canary_failed") from error

    async def unload_if_idle(self, name: str) -> None:
        """Unless somebody uses it or did so lately. Raises Unavailable, EngineError (vLLM: 500): tried again later."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self._busy(name):
                return
            self.loaded.discard(name)
            await self.engine.unload(name)
            if not self.in_flight[name]:  # else a request has come in meanwhile and waits for the lock
                del self._locks[name]
                self._last_used.pop(name, None)
                self._refused.pop(name, None)

    def let_go_if_idle(self, name: str) -> None:
        """Hold it no longer unless somebody uses it or did so lately; the engine keeps it until it is unloaded."""
        if not self._busy(name):
            self.loaded.discard(name)

    def _busy(self, name: str) -> bool:
        recently = time.monotonic() - self._settings.drain_seconds
        return self.in_flight[name] > 0 or self._last_used.get(name, 0.0) > recently

    def sweep(self) -> None:
        """Forget refusals whose time is over, and what was kept for their names."""
        for name in [n for n in self._refused if self.refusal(n) is None]:
            del self._refused[name]
            if name not in self.loaded and not self.in_flight[name]:
                self._locks.pop(name, None)
                self._last_used.pop(name, None)
