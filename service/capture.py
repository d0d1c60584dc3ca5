"""The engine's own record of an answer, gathered while it passes; and the client's view of the same.

One pass over each chunk does both. What the engine says about tokens is kept whether or not the client asked to see
it, and what the client did not ask for never goes out: the view is built from the fields that are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.asks import Ask
from service.errors import EngineError

Json = dict[str, Any]
SPOKEN_FIELDS = ("role", "content", "tool_calls", "refusal")
MESSAGE_FIELDS = (*SPOKEN_FIELDS, "reasoning", "reasoning_content")


@dataclass
class Choice:
    """One of the answers to a request."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, Json] = field(default_factory=dict)
    """By their position in the answer."""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None

    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def content(self) -> str:
        return "".join(self.text)

    @property
    def values(self) -> list[float] | None:
        """One log-prob per token, or None: a value that is missing makes the whole list missing, nothing is padded."""
        known = [v for v in self.logprobs if v is not None]
        return known if len(known) == len(self.logprobs) == len(self.token_ids) else None

    @property
    def reply(self) -> Json | None:
        """What the answer holds besides its text: reasoning and tool calls. None for plain text."""
        held: Json = {"reasoning": "".join(self.reasoning)} if self.reasoning else {}
        if self.tool_calls:
            held["tool_calls"] = [self.tool_calls[i] for i in sorted(self.tool_calls)]
        return held or None

    def take(self, choice: Json) -> None:
        """What a choice of a chunk or of a whole answer says about its tokens."""
        if (ids := choice.get("token_ids")) is not None:
            self.token_ids += ids
        if (logprobs := choice.get("logprobs")) is not None:
            if (entries := logprobs.get("content")) is not None:
                self.logprobs += [entry["logprob"] for entry in entries]
            elif (values := logprobs.get("token_logprobs")) is not None:
                self.logprobs += values
        if (prompt := choice.get("prompt_token_ids")) is not None:
            self.prompt_token_ids = prompt
        if (reason := choice.get("finish_reason")) is not None:
            self.finish_reason = reason

    def take_message(self, part: Json) -> None:
        """A chat's delta, or its whole message."""
        if content := part.get("content"):
            self.text.append(content)
        if thought := part.get("reasoning") or part.get("reasoning_content"):
            self.reasoning.append(thought)
        for position, call in enumerate(part.get("tool_calls") or ()):
            self._take_call(call.get("index", position), call)

    def _take_call(self, index: int, call: Json) -> None:
        known = self.tool_calls.setdefault(index, {"id": "", "type": "function", "function": _function("", "")})
        known["id"] = call.get("id") or known["id"]
        function, piece = known["function"], call.get("function") or {}
        function["name"] += piece.get("name") or ""
        function["arguments"] += piece.get("arguments") or ""


def _function(name: str, arguments: str) -> Json:
    return {"name": name, "arguments": arguments}


class Capture:
    """All choices of one request."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.choices = [Choice() for _ in range(ask.choices)]
        self._plain = not (ask.show_logprobs or ask.show_token_ids)
        self._open = ask.choices
        self._fields = MESSAGE_FIELDS if ask.show_reasoning else SPOKEN_FIELDS

    @property
    def finished(self) -> bool:
        return self._open == 0

    def whole(self, body: Json) -> Json:
        """The client's part of a whole answer: `choices`, `usage`, and the prompt's ids if asked for."""
        shown = [self._whole_choice(choice) for choice in body["choices"]]
        if not self.finished:
            raise EngineError("The engine gave fewer answers than were asked for.")
        out: Json = {"choices": shown, "usage": body.get("usage")}
        return out | self._prompt(body)

    def _whole_choice(self, choice: Json) -> Json:
        known = self._known(choice)
        known.take(choice)
        self._open -= 1
        shown: Json = {"index": choice["index"]}
        if self._ask.kind == "text":
            known.text.append(choice["text"])
            shown["text"] = choice["text"]
        else:
            message = choice["message"]
            known.take_message(message)
            shown["message"] = {k: v for k in self._fields if (v := message.get(k)) is not None and v != []}
            shown["message"].setdefault("content", None if known.tool_calls else "")
        return shown | self._details(choice)

    def chunk(self, event: Json) -> tuple[Json | None, bool]:
        """The client's part of one chunk, None where nothing is left of it; and whether it looks like an end.

        An end is a finish reason or the usage: it is held back until the answer is stored.
        """
        shown, ends = [], False
        for choice in event["choices"]:
            known = self._known(choice)
            if known.ended():
                continue
            known.take(choice)
            view = self._text_view(known, choice) if self._ask.kind == "text" else self._delta_view(known, choice)
            if known.ended():
                self._open -= 1
                ends = True
            if view is not None:
                shown.append(view)
        out = {"choices": shown} | self._prompt(event)
        if self._ask.show_running_usage and event.get("usage") is not None:
            out["usage"] = event["usage"]
        if not event["choices"] and event.get("usage") is not None:
            return (out | {"usage": event["usage"]} if self._ask.show_usage else None), True
        return (out if shown else None), ends

    def _delta_view(self, known: Choice, choice: Json) -> Json | None:
        delta = choice["delta"]
        known.take_message(delta)
        piece = {k: v for k in self._fields if (v := delta.get(k)) is not None}
        if not piece and self._plain and not known.ended():
            return None  # a token that a parser keeps to itself
        return {"index": choice["index"], "delta": piece} | self._details(choice)

    def _text_view(self, known: Choice, choice: Json) -> Json | None:
        text = choice["text"]
        known.text.append(text)
        if not text and self._plain and not known.ended():
            return None
        return {"index": choice["index"], "text": text} | self._details(choice)

    def _details(self, choice: Json) -> Json:
        shown: Json = {
            "logprobs": choice.get("logprobs") if self._ask.show_logprobs else None,
            "finish_reason": choice.get("finish_reason"),
        }
        if choice.get("stop_reason") is not None:
            shown["stop_reason"] = choice["stop_reason"]
        if self._ask.show_token_ids:
            shown["token_ids"] = choice.get("token_ids")
            if (ids := choice.get("prompt_token_ids")) is not None:  # of a text completion: vLLM says it per choice
                shown["prompt_token_ids"] = ids
        return shown

    def _known(self, choice: Json) -> Choice:
        index: int = choice.setdefault("index", 0)
        if not 0 <= index < len(self.choices):
            raise EngineError("The engine's answer cannot be read.")
        return self.choices[index]

    def _prompt(self, body: Json) -> Json:
        """The prompt's ids of a chat: kept for every choice, shown if asked for."""
        if (ids := body.get("prompt_token_ids")) is None:
            return {}
        for known in self.choices:
            known.prompt_token_ids = ids
        return {"prompt_token_ids": ids} if self._ask.show_token_ids else {}


def head(completion_id: str, ask: Ask, created: int, model: str, perennial: Mapping[str, Any]) -> Json:
    """What every part of one answer says alike."""
    whole = "chat.completion" if ask.kind == "chat" else "text_completion"
    kind = f"{whole}.chunk" if ask.stream and ask.kind == "chat" else whole
    return {"id": completion_id, "object": kind, "created": created, "model": model, "perennial": dict(perennial)}
