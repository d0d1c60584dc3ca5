"""What of a conversation can be put into a chat template: text, and by name what cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_core.errors import SampleError

_ROLE = re.compile(r"[a-z][a-z_]{0,31}")


def listed(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages. Raises SampleError `bad_message` for what is no list of mappings."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise SampleError("a conversation is a list of messages", code="bad_message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise SampleError(f"message {i} is a {type(message).__name__}, no mapping", code="bad_message")
    return [dict(m) for m in messages]


def readable_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their contents as text (`text_of`), fit for a chat template.

    An assistant's message may be without content: it calls tools, or thinks. Raises SampleError: `bad_message`,
    `unsupported_content`, `bad_text`.
    """
    made = listed(messages)
    if not made:
        raise SampleError("a conversation has one message at least", code="bad_message")
    for i, message in enumerate(made):
        if not _ROLE.fullmatch(str(message.get("role", ""))):
            raise SampleError(f"message {i}: {message.get('role')!r} is not a role", code="bad_message")
        if message.get("content") is not None or message["role"] != "assistant":
            message["content"] = text_of(message.get("content"), f"message {i}")
        check_text(message, f"message {i}")
    return made


def text_of(content: Any, where: str) -> str:
    """A message's content as one text: OpenAI's text parts are joined by a line break, as vLLM joins them.

    Raises SampleError: `bad_message` for what is no content, `unsupported_content` for a part that is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        said = "nothing" if content is None else f"a {type(content).__name__}"
        raise SampleError(f"{where}: its content is {said}, no text", code="bad_message")
    return "\n".join(_text_of_part(part, where) for part in content)


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise SampleError(
            f"{where} has a part of type {kind!r}: only text can be learnt from", code="unsupported_content"
        )
    text: str = part["text"]
    return text


def check_text(value: Any, where: str) -> None:
    """Raises SampleError `bad_text` for a lone surrogate anywhere in it: there is no token for half a character."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            message = f"{where} is no valid Unicode: half of a surrogate pair at character {error.start}"
            raise SampleError(message, code="bad_text") from error
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(key, where)
            check_text(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(inner, where)
