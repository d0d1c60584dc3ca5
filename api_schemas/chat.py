"""OpenAI's chat completions, as far as the gateway takes them. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from api_schemas.base import Request, Text
from api_schemas.sampling import MAX_TOP_LOGPROBS, OutputTokens, Sampling
from api_schemas.tools import MAX_TOOLS, CallId, ResponseFormat, Tool, ToolCall, ToolChoice

MAX_MESSAGES = 512


def _only_text(content: Any) -> Any:
    """Say what is wrong with a part before the union's own, longer complaint."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError("only parts of type text are taken: no images, audio, video or files")
    return content


class TextPart(Request):
    type: Literal["text"]
    text: Text


Content = Annotated[Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)], BeforeValidator(_only_text)]


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    """May be left out only where an assistant called tools."""
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    """The older name of `reasoning`."""
    refusal: Text | None = None
    """Taken because clients send back what they received; not forwarded."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.role != "assistant" and (self.tool_calls or self.thoughts is not None):
            raise ValueError("only an assistant has tool_calls and reasoning")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to role tool, and to no other")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required")
        return self

    @property
    def thoughts(self) -> str | None:
        return self.reasoning if self.reasoning is not None else self.reasoning_content

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(p.text for p in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """What the chat template sees and what is stored: role and text, tool calls, reasoning."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.thoughts is not None:
            message["reasoning"] = self.thoughts
        return message


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: OutputTokens | None = None
    max_completion_tokens: OutputTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    """False: reasoning is kept, and not shown."""

    @model_validator(mode="after")
    def _coherent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if not self.include_reasoning and (self.logprobs or self.return_token_ids):
            raise ValueError("log-probs and token ids would show the reasoning that include_reasoning: false hides")
        if self.allowed_token_ids is not None and self._has_grammar:
            raise ValueError("allowed_token_ids cannot be met together with response_format or a call that is forced")
        return self

    @property
    def _has_grammar(self) -> bool:
        formatted = self.response_format is not None and self.response_format.constrains
        return formatted or self.tool_choice not in (None, "none", "auto")

    @property
    def output_limit(self) -> int | None:
        """The wanted bound on generated tokens, whichever of the two fields carried it."""
        return self.max_completion_tokens or self.max_tokens
