"""Answers in the shape of Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from service.errors import PerennialError

Json = dict[str, Any]
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def error_body(error: PerennialError) -> Json:
    kind = _ERROR_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}


def message(answer: Json) -> Json:
    """A whole answer of the gateway as a message."""
    [choice], usage = answer["choices"], answer.get("usage") or {}
    said = choice["message"]
    content: list[Json] = []
    if thought := said.get("reasoning") or said.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    if said.get("content"):
        content.append({"type": "text", "text": said["content"]})
    content += [_tool_use(call) for call in said.get("tool_calls") or ()]
    called = bool(said.get("tool_calls"))
    counts = {"input_tokens": usage.get("prompt_tokens", 0), "output_tokens": usage.get("completion_tokens", 0)}
    return _head(answer) | {"content": content, "usage": counts} | _stop(choice, called)


def _head(answer: Json) -> Json:
    named = {k: answer[k] for k in ("id", "model", "perennial")}
    return {"type": "message", "role": "assistant", "stop_reason": None, "stop_sequence": None} | named


def _tool_use(call: Json) -> Json:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": _object(call)}


def _object(call: Json) -> Json:
    try:
        found = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        found = None
    # What is no JSON object has no place in `input`; the client sees what the model wrote.
    return found if isinstance(found, dict) else {"arguments": call["function"]["arguments"]}


def _stop(choice: Json, called: bool) -> Json:
    reason, sequence = choice.get("finish_reason"), choice.get("stop_reason")
    if isinstance(sequence, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    ended = "tool_use" if called and reason == "stop" else "end_turn"  # vLLM says `stop` of a tool that was named
    return {"stop_reason": _STOP_REASONS.get(reason or "", ended), "stop_sequence": None}


@dataclass
class MessageStream:
    """Turns the gateway's parts into Anthropic's events, (name, data) each: blocks are opened and closed in order."""

    head: Json
    _open: str | None = None
    """Kind of the block that is open, with its number for tools."""
    _index: int = -1
    _called: bool = False
    _stopped: Json = field(default_factory=dict)
    _usage: Json = field(default_factory=dict)

    def start(self, part: Json) -> Iterator[tuple[str, Json]]:
        """From the first part, which has the prompt's token ids."""
        counts = {"input_tokens": len(part.get("prompt_token_ids") or ()), "output_tokens": 0}
        yield "message_start", {"message": _head(self.head) | {"content": [], "usage": counts}}

    def take(self, part: Json) -> Iterator[tuple[str, Json]]:
        if (usage := part.get("usage")) is not None:
            self._usage = {"output_tokens": usage.get("completion_tokens", 0)}
        for choice in part["choices"]:
            yield from self._delta(choice["delta"])
            if choice.get("finish_reason") is not None:
                self._stopped = _stop(choice, self._called)

    def end(self) -> Iterator[tuple[str, Json]]:
        yield from self._close()
        yield "message_delta", {"delta": self._stopped, "usage": self._usage}
        yield "message_stop", {}

    def _delta(self, delta: Json) -> Iterator[tuple[str, Json]]:
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._piece({"type": "thinking_delta", "thinking": thought})
        if text := delta.get("content"):
            yield from self._block("text", {"type": "text", "text": ""})
            yield self._piece({"type": "text_delta", "text": text})
        for position, call in enumerate(delta.get("tool_calls") or ()):
            yield from self._tool(call.get("index", position), call)

    def _tool(self, number: int, call: Json) -> Iterator[tuple[str, Json]]:
        function = call.get("function") or {}
        self._called = True
        opening: Json = {
            "type": "tool_use",
            "id": call.get("id") or "",
            "name": function.get("name") or "",
            "input": {},
        }
        yield from self._block(f"tool {number}", opening)
        if arguments := function.get("arguments"):
            yield self._piece({"type": "input_json_delta", "partial_json": arguments})

    def _block(self, kind: str, opening: Json) -> Iterator[tuple[str, Json]]:
        if self._open == kind:
            return
        yield from self._close()
        self._open, self._index = kind, self._index + 1
        yield "content_block_start", {"index": self._index, "content_block": opening}

    def _close(self) -> Iterator[tuple[str, Json]]:
        if self._open is not None:
            yield "content_block_stop", {"index": self._index}
        self._open = None

    def _piece(self, delta: Json) -> tuple[str, Json]:
        return "content_block_delta", {"index": self._index, "delta": delta}
