"""OpenAI's chat completions, as far as the gateway takes them. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from api_schemas.base import ModelName, Request, Text

MAX_MESSAGES = 512
MAX_OUTPUT_TOKENS = 65_536


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text alone: what the chat template sees and what is stored."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(Request):
    include_usage: bool = False


StopString = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class ChatRequest(Request):
    model: ModelName
    """An adapter's name (its live version), `name@v7` (that version), or the base model."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=100_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool = False
    store: bool = True
    """False: the answer is not kept, and feedback on it is not possible."""
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    """Taken for compatibility; neither stored nor forwarded."""

    @model_validator(mode="after")
    def _coherent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def output_limit(self) -> int | None:
        """The wanted bound on generated tokens, whichever of the two fields carried it."""
        return self.max_completion_tokens or self.max_tokens
