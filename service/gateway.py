"""The gateway: one request, answered by exactly one version, every choice kept as a rollout.

The request to the engine is rebuilt from our own typed request (`service.asks`); the engine's token ids and log-probs
are kept whether or not the client asked to see them (`service.capture`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from service.asks import Ask
from service.capture import Capture, Choice, head
from service.context import Context
from service.engine_answers import EngineAway, EngineBusy, EngineFailed, EngineFull, ModelNotLoaded
from service.errors import EngineError, Unavailable, VersionRejected
from service.logprobs_mode import Mode
from service.serving.fleet import Served
from service.serving.router import session_key
from service.store import rollouts
from service.targets import Target, resolve_target

Json = dict[str, Any]
ELSEWHERE = (EngineAway, EngineBusy, EngineFull, EngineFailed)
"""What may be the fault of one engine: another one is tried, as long as the client has been sent nothing."""
TRIES = 2


@dataclass(frozen=True)
class _Call:
    """One request on its way."""

    tenant_id: str
    target: Target
    ask: Ask
    tried: list[str] = field(default_factory=list)
    """URLs of the replicas that were asked."""


@dataclass
class _Attempt:
    """What one engine has answered."""

    capture: Capture
    held: list[Json] = field(default_factory=list)
    """Parts that look like an end."""
    mode: Mode = "unknown"


class Gateway:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def complete(self, tenant_id: str, ask: Ask) -> Json:
        """One whole answer, stored before it is returned."""
        call = await self._call(tenant_id, ask)
        while True:
            try:
                raw, mode = await self._whole(call)
                break
            except ELSEWHERE:
                if not self._another(call):
                    raise
        capture = Capture(ask)
        with _readable():
            shown = capture.whole(raw)
        made = self._head(call)
        await self._keep(made["id"], call, capture, mode)
        return made | shown

    async def stream(self, tenant_id: str, ask: Ask) -> tuple[Json, AsyncGenerator[list[Json]]]:
        """What all parts of the answer say alike, and the parts as they come: those that came together, together."""
        call = await self._call(tenant_id, ask)
        made = self._head(call)
        return made, self._parts(made["id"], call)

    async def _parts(self, completion_id: str, call: _Call) -> AsyncGenerator[list[Json]]:
        """Nothing that looks like an end (a finish reason, the usage) is sent before the answer is stored."""
        begun = False
        while True:
            attempt = _Attempt(Capture(call.ask))
            try:
                async with aclosing(self._attempt(attempt, call)) as parts:
                    async for now in parts:
                        begun = True
                        yield now
                break
            except ELSEWHERE:
                if begun or not self._another(call):
                    raise
        await self._keep(completion_id, call, attempt.capture, attempt.mode)
        yield attempt.held

    async def _attempt(self, attempt: _Attempt, call: _Call) -> AsyncGenerator[list[Json]]:
        """The parts from one engine, to the end of its answer; those that are an end stay in `attempt`."""
        async with self._served(call) as served, self._retried_stream(call, served) as blocks:
            async for events in blocks:
                with _readable():
                    seen = [attempt.capture.chunk(event) for event in events]
                attempt.held += [part for part, ends in seen if ends and part is not None]
                if now := [part for part, ends in seen if not ends and part is not None]:
                    yield now
            if not attempt.capture.finished:
                raise EngineFailed("The engine's answer ended early; try again.")
            attempt.mode = await served.engine.logprobs_mode(call.target.base_model)

    def _another(self, call: _Call) -> bool:
        """Whether to try again, now: on a replica that holds the version and has not failed on this request."""
        # Nothing tried: no replica was up, and `hold` has looked at all of them.
        return 0 < len(call.tried) < TRIES and bool(self._context.serving.others(call.target.served, call.tried))

    async def _call(self, tenant_id: str, ask: Ask) -> _Call:
        target = await resolve_target(self._context, tenant_id, ask.model)
        return _Call(tenant_id, target, ask)

    def _head(self, call: _Call) -> Json:
        about = {"adapter": call.target.adapter, "version": call.target.n}
        return head(new_completion_id(call.ask), call.ask, int(time.time()), call.target.model, about)

    @asynccontextmanager
    async def _served(self, call: _Call) -> AsyncIterator[Served]:
        target = call.target
        session = session_key(call.tenant_id, target.adapter_id, call.ask.messages)
        holding = self._context.serving.hold(target.adapter_id, target.n, session=session, tried=call.tried)
        try:
            async with holding as served:
                yield served
        except VersionRejected as error:  # it was good when it was published: no fault of this request
            raise Unavailable(
                f"{target.model} cannot be served at present.", code="version_unavailable", retry_after=30
            ) from error

    async def _whole(self, call: _Call) -> tuple[Json, Mode]:
        """One engine's whole answer, and what its log-probs mean."""
        async with self._served(call) as served:
            payload = call.ask.for_engine(served.name, call.tenant_id)
            try:
                raw = await served.engine.generate(call.ask.path, payload)
            except ModelNotLoaded:  # the engine was restarted and has forgotten the version
                await served.reload()
                raw = await served.engine.generate(call.ask.path, payload)
            return raw, await served.engine.logprobs_mode(call.target.base_model)

    @asynccontextmanager
    async def _retried_stream(self, call: _Call, served: Served) -> AsyncIterator[AsyncIterator[list[Json]]]:
        payload = call.ask.for_engine(served.name, call.tenant_id)
        async with AsyncExitStack() as stack:
            try:
                blocks = await stack.enter_async_context(served.engine.stream(call.ask.path, payload))
            except ModelNotLoaded:
                await served.reload()
                blocks = await stack.enter_async_context(served.engine.stream(call.ask.path, payload))
            yield blocks

    async def _keep(self, completion_id: str, call: _Call, capture: Capture, mode: Mode) -> None:
        """Store every choice as a rollout. Raises EngineError if the engine gave no token ids: nothing is guessed."""
        if not call.ask.store:
            return
        for choice in capture.choices:
            said = choice.content or choice.reply
            if choice.prompt_token_ids is None or (said and not choice.token_ids):
                raise EngineError("The engine gave no token ids for this answer: it cannot be learnt from.")
        person = self._context.keys.pseudonym(call.tenant_id, call.ask.user) if call.ask.user else None
        answers = [
            _rollout(rollouts.id_of(completion_id, i), call, choice, mode, person)
            for i, choice in enumerate(capture.choices)
        ]
        await anyio.to_thread.run_sync(self._store, answers)

    def _store(self, answers: list[rollouts.Answer]) -> None:
        with self._context.database.write() as s:
            rollouts.add_all(s, answers)


def _rollout(rollout_id: str, call: _Call, choice: Choice, mode: Mode, person: str | None) -> rollouts.Answer:
    return rollouts.Answer(
        id=rollout_id,
        tenant_id=call.tenant_id,
        adapter_id=call.target.adapter_id,
        base_model=call.target.base_model,
        version_n=call.target.n,
        messages=call.ask.messages,
        tools=call.ask.tools,
        response=choice.content,
        reply=choice.reply,
        prompt_token_ids=choice.prompt_token_ids or [],
        response_token_ids=choice.token_ids,
        logprobs=choice.values,
        logprobs_mode=mode,
        sampling=call.ask.sampling,
        finish_reason=choice.finish_reason,
        person=person,
    )


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
