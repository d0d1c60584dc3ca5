"""The gateway: one chat request, answered by exactly one version, kept as a rollout.

The request to the engine is rebuilt from our own typed request: nothing of the client's is forwarded as it came. The
engine's token ids and log-probs are kept whether or not the client asked to see them.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from api_schemas.chat import ChatRequest
from service.context import Context
from service.engine_client import ModelNotLoaded
from service.errors import EngineError, NotFound, Unavailable, VersionRejected
from service.serving.fleet import Served
from service.serving.router import session_key
from service.store import adapters, rollouts, versions

Json = dict[str, Any]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")


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


@dataclass
class Capture:
    """The engine's own record of one answer, gathered while it streams."""

    text: list[str] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, choice: Json, text: str | None) -> None:
        """Add one chunk's choice (or a whole answer's)."""
        self.text.append(text or "")
        self.token_ids += choice.get("token_ids") or []
        self.logprobs += [float(entry["logprob"]) for entry in (choice.get("logprobs") or {}).get("content") or []]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


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


def engine_payload(request: ChatRequest, served: str, tenant_id: str) -> Json:
    """The engine's request: only fields that we know, with ids and log-probs always on."""
    payload: Json = {
        "model": served,
        "messages": [m.plain() for m in request.messages],
        "logprobs": True,
        "return_token_ids": True,
        "cache_salt": hashlib.sha256(f"{tenant_id}/{served}".encode()).hexdigest(),
    }
    payload |= {k: v for k in SAMPLING if (v := getattr(request, k)) is not None}
    if request.output_limit is not None:
        payload["max_tokens"] = request.output_limit
    if request.top_logprobs:
        payload["top_logprobs"] = request.top_logprobs
    if request.stream:
        payload |= {"stream": True, "stream_options": {"include_usage": True}}
    return payload


class Gateway:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def complete(self, tenant_id: str, request: ChatRequest) -> Json:
        """One whole answer, stored before it is returned."""
        target = await anyio.to_thread.run_sync(resolve_target, self._context, tenant_id, request.model)
        async with self._served(target, tenant_id, request) as served:
            raw = await self._retried_chat(served, engine_payload(request, served.name, tenant_id))
        choice, capture = raw["choices"][0], Capture(prompt_token_ids=raw.get("prompt_token_ids"))
        text = choice["message"].get("content") or ""
        capture.take(choice, text)
        completion_id = new_completion_id()
        await self._keep(completion_id, tenant_id, target, request, capture)
        body = _envelope(completion_id, "chat.completion", target)
        shown: Json = {"index": 0, "message": {"role": "assistant", "content": text}}
        shown |= _visible(choice, request) | {"finish_reason": capture.finish_reason}
        body |= {"choices": [shown], "usage": raw.get("usage")}
        if request.return_token_ids:
            body["prompt_token_ids"] = capture.prompt_token_ids
        return body

    async def stream(self, tenant_id: str, request: ChatRequest) -> AsyncGenerator[Json]:
        """OpenAI chunks as tokens come. The last ones are sent only after the answer is stored."""
        target = await anyio.to_thread.run_sync(resolve_target, self._context, tenant_id, request.model)
        completion_id, capture = new_completion_id(), Capture()
        envelope = _envelope(completion_id, "chat.completion.chunk", target)
        held: list[Json] = []
        async with self._served(target, tenant_id, request) as served:
            payload = engine_payload(request, served.name, tenant_id)
            async with self._retried_stream(served, payload) as chunks:
                async for chunk in chunks:
                    out = _visible_chunk(envelope, chunk, request, capture)
                    if capture.finish_reason is not None:
                        held.append(out)  # usage too: nothing that looks like an end before it is stored
                    elif out["choices"]:
                        yield out
        if capture.finish_reason is None:
            raise EngineError("The engine's answer ended early; try again.")
        await self._keep(completion_id, tenant_id, target, request, capture)
        for out in held:
            if out["choices"] or (request.stream_options and request.stream_options.include_usage):
                yield out

    @asynccontextmanager
    async def _served(self, target: Target, tenant_id: str, request: ChatRequest) -> AsyncIterator[Served]:
        session = session_key(tenant_id, target.adapter_id, [m.plain() for m in request.messages])
        try:
            async with self._context.serving.hold(target.adapter_id, target.n, session=session) as served:
                yield served
        except VersionRejected as error:  # it was good when it was published: no fault of this request
            raise Unavailable(
                f"{target.model} cannot be served at present.", code="version_unavailable", retry_after=30
            ) from error

    async def _retried_chat(self, served: Served, payload: Json) -> Json:
        try:
            return await served.engine.chat(payload)
        except ModelNotLoaded:  # the engine was restarted and has forgotten the version
            await served.reload()
            return await served.engine.chat(payload)

    @asynccontextmanager
    async def _retried_stream(self, served: Served, payload: Json) -> AsyncIterator[AsyncIterator[Json]]:
        async with AsyncExitStack() as stack:
            try:
                chunks = await stack.enter_async_context(served.engine.stream(payload))
            except ModelNotLoaded:
                await served.reload()
                chunks = await stack.enter_async_context(served.engine.stream(payload))
            yield chunks

    async def _keep(
        self, completion_id: str, tenant_id: str, target: Target, request: ChatRequest, capture: Capture
    ) -> None:
        """Store the answer as a rollout. Raises EngineError if the engine gave no token ids: nothing is guessed."""
        if not request.store:
            return
        text = "".join(capture.text)
        if capture.prompt_token_ids is None or (text and not capture.token_ids):
            raise EngineError("The engine gave no token ids for this answer: it cannot be learnt from.")
        answer = rollouts.Answer(
            id=completion_id,
            tenant_id=tenant_id,
            adapter_id=target.adapter_id,
            base_model=target.base_model,
            version_n=target.n,
            messages=[m.plain() for m in request.messages],
            response=text,
            prompt_token_ids=capture.prompt_token_ids,
            response_token_ids=capture.token_ids,
            # A value that is missing makes the whole list missing: the worker computes it and says so.
            logprobs=capture.logprobs if len(capture.logprobs) == len(capture.token_ids) else None,
            logprobs_mode=await self._context.engine.logprobs_mode(),
            sampling={k: getattr(request, k) for k in SAMPLING} | {"max_tokens": request.output_limit},
            finish_reason=capture.finish_reason,
        )
        await anyio.to_thread.run_sync(self._store, answer)

    def _store(self, answer: rollouts.Answer) -> None:
        with self._context.database.write() as s:
            rollouts.add(s, answer)


def new_completion_id() -> str:
    """Ours, never the caller's and never the engine's."""
    return f"chatcmpl-{secrets.token_hex(16)}"


def _envelope(completion_id: str, kind: str, target: Target) -> Json:
    return {
        "id": completion_id,
        "object": kind,
        "created": int(time.time()),
        "model": target.model,
        "perennial": {"adapter": target.adapter, "version": target.n},
    }


def _visible(choice: Json, request: ChatRequest) -> Json:
    """Log-probs and token ids, only if the client asked for them."""
    shown: Json = {"logprobs": choice.get("logprobs") if request.logprobs else None}
    if request.return_token_ids:
        shown["token_ids"] = choice.get("token_ids")
    return shown


def _visible_chunk(envelope: Json, chunk: Json, request: ChatRequest, capture: Capture) -> Json:
    """The client's view of one engine chunk; what it carries is captured on the way."""
    out = dict(envelope)
    if chunk.get("prompt_token_ids") is not None:
        capture.prompt_token_ids = chunk["prompt_token_ids"]
        if request.return_token_ids:
            out["prompt_token_ids"] = capture.prompt_token_ids
    out["choices"] = []
    for choice in chunk["choices"]:
        delta = choice["delta"]
        capture.take(choice, delta.get("content"))
        shown = {"index": 0, "delta": {k: delta[k] for k in ("role", "content") if delta.get(k) is not None}}
        out["choices"].append(shown | _visible(choice, request) | {"finish_reason": choice.get("finish_reason")})
    if chunk.get("usage") is not None:
        out["usage"] = chunk["usage"]
    return out
