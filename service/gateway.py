"""The gateway: one request, answered by exactly one version, every choice kept as a rollout.

The request to the engine is rebuilt from our own typed request (`service.asks`); the engine's token ids and log-probs
are kept whether or not the client asked to see them (`service.capture`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from service.asks import Ask
from service.capture import Capture, head
from service.context import Context
from service.engine_client import ModelNotLoaded
from service.errors import EngineError, NotFound, Unavailable, VersionRejected
from service.logprobs_mode import Mode
from service.serving.fleet import Served
from service.serving.router import session_key
from service.store import adapters, rollouts, versions

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Who answers: a version of an adapter, or the base model (`n` 0)."""

    adapter_id: str | None
    adapter: str | None
    n: int
    base_model: str

    @property
    def model(self) -> str:
        """What the answer says: always the exact version."""
        return self.base_model if self.adapter is None else f"{self.adapter}@v{self.n}"


def resolve_target(context: Context, tenant_id: str, model: str) -> Target:
    """`name`, `name@v7` or the base model. Raises NotFound, Unprocessable for a rejected version."""
    if model == context.base_model:
        return Target(None, None, 0, context.base_model)
    name, at, version = model.partition("@v")
    if at and not (version.isascii() and version.isdigit() and len(version) < 10):
        raise NotFound(
            f"'{model[:80]}' is not a model: versions are written name@v7.", code="model_not_found", param="model"
        )
    with context.database.read() as s:
        try:
            adapter = adapters.by_name(s, tenant_id, name)
        except NotFound as error:
            raise NotFound(f"There is no model '{model[:80]}'.", code="model_not_found", param="model") from error
        n = int(version) if at else adapter.live_n
        if n:
            versions.servable(s, adapter, n)
        return Target(adapter.id, adapter.name, n, adapter.base_model)


class Gateway:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def complete(self, tenant_id: str, ask: Ask) -> Json:
        """One whole answer, stored before it is returned."""
        target = await self._resolved(tenant_id, ask)
        capture = Capture(ask)
        async with self._served(target, tenant_id, ask) as served:
            raw = await self._retried(ask, served, tenant_id)
            mode = await served.engine.logprobs_mode(target.base_model)
        with _readable():
            shown = capture.whole(raw)
        made = self._head(ask, target)
        await self._keep(made["id"], tenant_id, target, ask, capture, mode)
        return made | shown

    async def stream(self, tenant_id: str, ask: Ask) -> tuple[Json, AsyncGenerator[list[Json]]]:
        """What all parts of the answer say alike, and the parts as they come: those that came together, together."""
        target = await self._resolved(tenant_id, ask)
        made = self._head(ask, target)
        return made, self._parts(made["id"], tenant_id, target, ask)

    async def _parts(self, completion_id: str, tenant_id: str, target: Target, ask: Ask) -> AsyncGenerator[list[Json]]:
        """Nothing that looks like an end (a finish reason, the usage) is sent before the answer is stored."""
        capture, held = Capture(ask), list[Json]()
        async with (
            self._served(target, tenant_id, ask) as served,
            self._retried_stream(ask, served, tenant_id) as blocks,
        ):
            async for events in blocks:
                with _readable():
                    seen = [capture.chunk(event) for event in events]
                held += [part for part, ends in seen if ends and part is not None]
                if now := [part for part, ends in seen if not ends and part is not None]:
                    yield now
            mode = await served.engine.logprobs_mode(target.base_model)
        if not capture.finished:
            raise EngineError("The engine's answer ended early; try again.")
        await self._keep(completion_id, tenant_id, target, ask, capture, mode)
        yield held

    def _head(self, ask: Ask, target: Target) -> Json:
        about = {"adapter": target.adapter, "version": target.n}
        return head(new_completion_id(ask), ask, int(time.time()), target.model, about)

    async def _resolved(self, tenant_id: str, ask: Ask) -> Target:
        return await anyio.to_thread.run_sync(resolve_target, self._context, tenant_id, ask.model)

    @asynccontextmanager
    async def _served(self, target: Target, tenant_id: str, ask: Ask) -> AsyncIterator[Served]:
        session = session_key(tenant_id, target.adapter_id, ask.messages)
        try:
            async with self._context.serving.hold(target.adapter_id, target.n, session=session) as served:
                yield served
        except VersionRejected as error:  # it was good when it was published: no fault of this request
            raise Unavailable(
                f"{target.model} cannot be served at present.", code="version_unavailable", retry_after=30
            ) from error

    async def _retried(self, ask: Ask, served: Served, tenant_id: str) -> Json:
        payload = ask.for_engine(served.name, tenant_id)
        try:
            return await served.engine.generate(ask.path, payload)
        except ModelNotLoaded:  # the engine was restarted and has forgotten the version
            await served.reload()
            return await served.engine.generate(ask.path, payload)

    @asynccontextmanager
    async def _retried_stream(
        self, ask: Ask, served: Served, tenant_id: str
    ) -> AsyncIterator[AsyncIterator[list[Json]]]:
        payload = ask.for_engine(served.name, tenant_id)
        async with AsyncExitStack() as stack:
            try:
                blocks = await stack.enter_async_context(served.engine.stream(ask.path, payload))
            except ModelNotLoaded:
                await served.reload()
                blocks = await stack.enter_async_context(served.engine.stream(ask.path, payload))
            yield blocks

    async def _keep(
        self, completion_id: str, tenant_id: str, target: Target, ask: Ask, capture: Capture, mode: Mode
    ) -> None:
        """Store every choice as a rollout. Raises EngineError if the engine gave no token ids: nothing is guessed."""
        if not ask.store:
            return
        for choice in capture.choices:
            said = choice.content or choice.reply
            if choice.prompt_token_ids is None or (said and not choice.token_ids):
                raise EngineError("The engine gave no token ids for this answer: it cannot be learnt from.")
        answers = [
            rollouts.Answer(
                id=rollouts.id_of(completion_id, index),
                tenant_id=tenant_id,
                adapter_id=target.adapter_id,
                base_model=target.base_model,
                version_n=target.n,
                messages=ask.messages,
                tools=ask.tools,
                response=choice.content,
                reply=choice.reply,
                prompt_token_ids=choice.prompt_token_ids or [],
                response_token_ids=choice.token_ids,
                logprobs=choice.values,
                logprobs_mode=mode,
                sampling=ask.sampling,
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(capture.choices)
        ]
        await anyio.to_thread.run_sync(self._store, answers)

    def _store(self, answers: list[rollouts.Answer]) -> None:
        with self._context.database.write() as s:
            for answer in answers:
                rollouts.add(s, answer)


@contextmanager
def _readable() -> Iterator[None]:
    """Turns surprises in the shape of the engine's answer into EngineError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineError("The engine's answer cannot be read.") from error


def new_completion_id(ask: Ask) -> str:
    """Ours, never the caller's and never the engine's."""
    return ask.id_prefix + secrets.token_hex(16)
