"""OpenAI's text completions, as far as the gateway takes them. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from api_schemas.base import Text
from api_schemas.sampling import MAX_TOP_LOGPROBS, OutputTokens, Sampling, TokenId

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

    @model_validator(mode="after")
    def _coherent(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self
