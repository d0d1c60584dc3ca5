"""How an answer is drawn: the fields that chat and text completions share, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from api_schemas.base import ModelName, Request, Text, UserName

MAX_OUTPUT_TOKENS = 65_536
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
"""vLLM's own default bound."""

REFUSED = {
    "chat_template": "templates come with the model",
    "chat_template_kwargs": "templates come with the model",
    "kv_transfer_params": "it reaches into the engine's memory",
    "ec_transfer_params": "it reaches into the engine's memory",
    "prompt_embeds": "prompts are text",
    "priority": "all requests are equal",
    "cache_salt": "the gateway sets its own",
    "request_id": "ids are minted here",
    "session_id": "ids are minted here",
    "media_io_kwargs": "only text is taken",
    "mm_processor_kwargs": "only text is taken",
    "modalities": "only text is taken",
    "audio": "only text is taken",
    "structured_outputs": "use response_format",
    "guided_json": "use response_format",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "best_of": "use n",
    "echo": "the prompt is not repeated",
    "suffix": "text is only continued",
    "prompt_logprobs": "only the answer's log-probs are given",
}
"""Fields of OpenAI or vLLM that are refused on purpose, and why; a client is told so. Every other unknown field is
refused as well."""


def _plain_token(key: str) -> str:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ValueError("must name tokens by their ids")
    return key


Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, AfterValidator(_plain_token)]
OutputTokens = Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class StreamOptions(Request):
    include_usage: bool = False


class Sampling(Request):
    """OpenAI's sampling fields and vLLM's harmless ones. What is left out is the model's own default."""

    model: ModelName
    """An adapter's name (its live version), `name@v7` (that version), or the base model."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Choices; each is kept as a rollout of its own."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=100_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_OUTPUT_TOKENS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: Annotated[list[StopString], Field(max_length=64)] | None = None
    """Words that the engine does not say."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    store: bool = True
    """False: the answer is not kept, and feedback on it is not possible."""
    user: UserName | None = None
    """Whose words these are: `DELETE /v1/users/{user}` erases them. A keyed digest is kept; nothing is forwarded."""
    safety_identifier: UserName | None = None
    """OpenAI's newer name for the same; it counts where both are given."""

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def person(self) -> str | None:
        return self.safety_identifier or self.user

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "bad_words",
)  # fmt: skip
"""What goes to the engine as it came."""
