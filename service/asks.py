"""What is asked of the engine, whichever route it came by: rebuilt from typed requests, never forwarded as it came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from api_schemas.chat import ChatRequest
from api_schemas.completions import CompletionRequest
from api_schemas.sampling import SAMPLING_FIELDS, Sampling
from service.errors import Unprocessable

Json = dict[str, Any]
ENGINE_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What vLLM and the embedded engine take where neither the request nor the model's generation_config.json says."""


@dataclass(frozen=True)
class Ask:
    """One request, ready for any version: `payload` lacks only the served name and the cache salt."""

    kind: Literal["chat", "text"]
    model: str
    payload: Json
    choices: int
    messages: list[Json]
    """Of a chat; a text completion has none."""
    tools: list[Json] | None
    sampling: Json
    """What the answer is drawn with, defaults included: kept, for it says what the log-probs mean."""
    stream: bool
    store: bool
    show_logprobs: bool
    show_token_ids: bool
    show_usage: bool
    show_running_usage: bool
    show_reasoning: bool
    id_prefix: str
    user: str | None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.kind == "chat" else "/v1/completions"

    def for_engine(self, served: str, tenant_id: str) -> Json:
        """The engine's body. The salt keeps tenants and versions out of each other's prefix cache; alphanumeric."""
        salt = hashlib.sha256(f"{tenant_id}/{served}".encode()).hexdigest()
        return {"model": served, **self.payload, "cache_salt": salt}


def chat_ask(request: ChatRequest, defaults: Mapping[str, Any]) -> Ask:
    """`defaults`: the model's own sampling (see `sampling_defaults`)."""
    messages = [m.plain() for m in request.messages]
    tools = [t.model_dump(exclude_none=True) for t in request.tools] if request.tools else None
    payload: Json = {"messages": messages} | _common(request, defaults, request.output_limit)
    payload |= {"logprobs": True}
    if request.top_logprobs:
        payload["top_logprobs"] = request.top_logprobs
    if tools is not None:
        payload["tools"] = tools
    if request.tool_choice is not None:
        choice = request.tool_choice
        payload["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
    if request.parallel_tool_calls is not None:
        payload["parallel_tool_calls"] = request.parallel_tool_calls
    if request.response_format is not None:
        payload["response_format"] = request.response_format.plain()
    if request.reasoning_effort is not None:
        payload["reasoning_effort"] = request.reasoning_effort
    return Ask(
        kind="chat",
        id_prefix="chatcmpl-",
        messages=messages,
        tools=tools if request.tool_choice != "none" else None,
        sampling=_sampling(request, defaults, request.output_limit) | _thinking(request),
        show_logprobs=request.logprobs,
        show_reasoning=request.include_reasoning,
        payload=payload,
        **_shown(request),
    )


def text_ask(request: CompletionRequest, defaults: Mapping[str, Any]) -> Ask:
    payload: Json = {"prompt": request.prompt} | _common(request, defaults, request.max_tokens)
    payload["logprobs"] = request.logprobs or 0
    if request.add_special_tokens is not None:
        payload["add_special_tokens"] = request.add_special_tokens
    if request.response_format is not None:
        payload["response_format"] = request.response_format.plain()
    return Ask(
        kind="text",
        id_prefix="cmpl-",
        messages=[],
        tools=None,
        sampling=_sampling(request, defaults, request.max_tokens),
        show_logprobs=request.logprobs is not None,
        show_reasoning=True,
        payload=payload,
        **_shown(request),
    )


def sampling_defaults(model_dir: Path) -> dict[str, float]:
    """The sampling that the model's makers ask for; vLLM takes it where a request says nothing, and so do we.

    It is sent with each request, so that what is recorded is what happens, however the engine was started.
    """
    try:
        found = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k in ENGINE_DEFAULTS if isinstance(v := found.get(k), int | float) and not isinstance(v, bool)}


def _common(request: Sampling, defaults: Mapping[str, Any], output_limit: int | None) -> Json:
    payload: Json = {**defaults} | _given(request) | {"return_token_ids": True}
    if request.choices > 1:
        payload["n"] = request.choices
    if output_limit is not None:
        payload["max_tokens"] = output_limit
    if (request.min_tokens or 0) > (output_limit or request.min_tokens or 0):
        raise Unprocessable("'min_tokens': is more than max_tokens.", code="invalid_parameter", param="min_tokens")
    if request.stream:
        running = {"continuous_usage_stats": True} if request.wants_running_usage else {}
        payload |= {"stream": True, "stream_options": {"include_usage": True} | running}
    return payload


def _given(request: Sampling) -> Json:
    given = {k: v for k in SAMPLING_FIELDS if (v := getattr(request, k)) is not None}
    if request.repetition_detection is not None:
        given["repetition_detection"] = request.repetition_detection.model_dump()
    return given


def _sampling(request: Sampling, defaults: Mapping[str, Any], output_limit: int | None) -> Json:
    kept = ENGINE_DEFAULTS | {**defaults} | _given(request)
    return kept if output_limit is None else kept | {"max_tokens": output_limit}


def _thinking(request: ChatRequest) -> Json:
    return {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}


def _shown(request: Sampling) -> Json:
    return {
        "model": request.model,
        "choices": request.choices,
        "stream": request.stream,
        "store": request.store,
        "show_token_ids": request.return_token_ids,
        "show_usage": request.wants_usage,
        "show_running_usage": request.wants_running_usage,
        "user": request.person,
    }
