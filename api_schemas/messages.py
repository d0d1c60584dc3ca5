"""Anthropic's messages, as far as the gateway takes them. Anything else is refused by name.

Marks for caching are taken, because agents send them, and mean nothing here. So is `thinking`: whether a
model reasons is its template's business.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from api_schemas.base import ModelName, Request, Text
from api_schemas.chat import MAX_MESSAGES
from api_schemas.sampling import OutputTokens, StopString
from api_schemas.tools import MAX_TOOLS, CallId, JsonObject, ToolName

MAX_BLOCKS = 512


class CacheControl(Request):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Request):
    """What every content block may carry."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: Text
    citations: None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: JsonObject


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool = False


class ThinkingBlock(Request):
    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


def _only_known(content: Any) -> Any:
    """Say what is wrong with a block before the union's own, longer complaint."""
    known = {"text", "tool_use", "tool_result", "thinking"}
    for block in content if isinstance(content, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise ValueError("only blocks of text, thinking, tool_use and tool_result are taken: no images, no files")
    return content


Content = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class Message(Request):
    role: Literal["user", "assistant"]
    content: Annotated[
        Text | Annotated[list[Content], Field(min_length=1, max_length=MAX_BLOCKS)], BeforeValidator(_only_known)
    ]


class AnthropicTool(Block):
    name: ToolName
    description: Text | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None


class AnthropicToolChoice(Request):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False


class Metadata(Request):
    user_id: Annotated[str, StringConstraints(max_length=256)] | None = None


class Thinking(Request):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class MessagesRequest(Request):
    model: ModelName
    """An adapter's name (its live version), `name@v7` (that version), or the base model."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: OutputTokens
    system: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    store: bool = True
    """Ours: false keeps nothing, and feedback on the answer is not possible."""

    def as_chat(self) -> dict[str, Any]:
        """The same as a body of OpenAI's chat completions."""
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": [*_system(self.system), *(m for said in self.messages for m in _turns(said))],
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "store": self.store,
        }
        optional: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        optional["user"] = self.metadata.user_id if self.metadata else None
        chat |= {k: v for k, v in optional.items() if v is not None}
        if self.stop_sequences:
            chat["stop"] = self.stop_sequences
        if self.tools:
            chat["tools"] = [_tool(t) for t in self.tools]
        if self.tool_choice is not None:
            chat |= _choice(self.tool_choice)
        return chat


def _joined(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(b.text for b in content or ())


def _system(system: str | list[TextBlock] | None) -> list[dict[str, Any]]:
    text = _joined(system)
    return [{"role": "system", "content": text}] if text else []


def _turns(message: Message) -> list[dict[str, Any]]:
    """One message of theirs is several of OpenAI's: results of tools first, then what the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    turns: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            text = _joined(block.content)
            turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    text = _joined([b for b in message.content if isinstance(b, TextBlock)])
    calls = [_call(b) for b in message.content if isinstance(b, ToolUseBlock)]
    thoughts = [b.thinking for b in message.content if isinstance(b, ThinkingBlock)]
    said: dict[str, Any] = {"role": message.role, "content": text}
    if calls:
        said["tool_calls"] = calls
    if thoughts:
        said["reasoning"] = "\n".join(thoughts)
    return [*turns, said] if text or len(said) > 2 or not turns else turns


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: AnthropicToolChoice) -> dict[str, Any]:
    names: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": choice.name}}
    made: dict[str, Any] = {"tool_choice": names.get(choice.type, named)}
    return made | {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else made
