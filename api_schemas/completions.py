"""OpenAI's text completions, as far as the gateway takes them. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from api_schemas.base import Text
from api_schemas.sampling import MAX_TOP_LOGPROBS, OutputTokens, Sampling, TokenId
from api_schemas.tools import ResponseFormat

MAX_PROMPT_TOKENS = 1_048_576


class CompletionRequest(Sampling):
    prompt: (
        Annotated[Text, StringConstraints(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    )
    """One prompt, as text or as token ids; several prompts are several requests."""
    max_tokens: OutputTokens = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """So many alternatives per token; 0: the chosen token's log-prob alone."""
    add_special_tokens: bool | None = None
    """Before a text, such as the one that begins every sequence; the engine's default is true."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _coherent(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.allowed_token_ids is not None and self.response_format is not None and self.response_format.constrains:
            raise ValueError("allowed_token_ids cannot be met together with response_format")
        return self
