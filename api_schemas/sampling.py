"""How an answer is drawn: the fields that chat and text completions share, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from api_schemas.base import ModelName, Request, Text, UserName

MAX_OUTPUT_TOKENS = 65_536
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
"""vLLM's own default bound."""
MAX_ALLOWED_TOKENS = 1024
"""vLLM's own bound on a GPU; there one more ends the engine, not the request."""
MAX_BAD_BYTES = 512
"""Of `bad_words` in UTF-8, each with a space before it. On a GPU more than 1024 tokens of them end vLLM's engine: each
is tokenised twice, and a token has a byte or more."""

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
    "logprob_token_ids": "use top_logprobs",  # in vLLM 0.32 it takes them from every other request of the same step
    "use_beam_search": "answers are drawn, not searched for",
    "length_penalty": "it belongs to beam search",
    "watermarking": "it is the operator's to decide",
    "truncate_prompt_tokens": "a prompt that is too long is an error, never cut",
    "truncation_side": "a prompt that is too long is an error, never cut",
    "add_generation_prompt": "every answer is a turn of its own",
    "continue_final_message": "every answer is a turn of its own",
    "add_special_tokens": "templates come with the model",
    "documents": "put them into messages",
    "vllm_xargs": "it reaches into the engine's plugins",
    "routed_experts_prompt_start": "only tokens and log-probs are given",
    "return_prompt_text": "return_token_ids gives the prompt's ids",
    "return_token_offsets": "only tokens and log-probs are given",
    "mm_payload": "only text is taken",
    "return_mm_kwargs": "only text is taken",
}
"""Fields of OpenAI or vLLM that are refused on purpose, and why; a client is told so. Every other unknown field is
refused as well. A test holds this and the fields below against vLLM's own lists."""


def _few_bytes(words: list[str]) -> list[str]:
    if sum(len(word.encode(errors="replace")) + 1 for word in words) > MAX_BAD_BYTES:
        raise ValueError(f"must have at most {MAX_BAD_BYTES} bytes in all, one for each word besides")
    return words


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
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk says the counts so far."""


class RepetitionDetection(Request):
    """An answer ends (`finish_reason` is `repetition`) where a pattern of tokens has come so often in a row.

    vLLM looks after every token: the bounds are what all who are answered meanwhile have to wait for.
    """

    max_pattern_size: Annotated[int, Field(ge=0, le=32)] = 0
    """Tokens; 0: nothing is looked for."""
    min_pattern_size: Annotated[int, Field(ge=0, le=32)] = 0
    min_count: Annotated[int, Field(ge=0, le=16)] = 0

    @model_validator(mode="after")
    def _coherent(self) -> RepetitionDetection:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError("min_pattern_size is more than max_pattern_size")
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError("min_count must be at least 2")
        return self


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
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """-1: none, as in vLLM."""
    stop: StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_OUTPUT_TOKENS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: Annotated[list[StopString], Field(max_length=64), AfterValidator(_few_bytes)] | None = None
    """Words that the engine does not say."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    """The engine draws no other token."""
    thinking_token_budget: Annotated[int, Field(ge=-1, le=MAX_OUTPUT_TOKENS)] | None = None
    """After so many tokens of reasoning the engine ends it; -1: never. vLLM needs --reasoning-config for it."""
    repetition_detection: RepetitionDetection | None = None
    stream_interval: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per chunk of a stream."""
    return_tokens_as_token_ids: bool | None = None
    """With log-probs: tokens are written as `token_id:17`."""
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

    @model_validator(mode="after")
    def _seeds_fit(self) -> Sampling:
        """Each choice has a seed of its own, counted up from the first: beyond 64 bits vLLM's engine would end."""
        if self.seed is not None and self.seed + self.choices > 2**63:
            raise ValueError("seed plus n is too large")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.wants_usage and self.stream_options.continuous_usage_stats


SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "bad_words", "allowed_token_ids", "thinking_token_budget",
    "repetition_detection", "stream_interval", "return_tokens_as_token_ids",
)  # fmt: skip
"""What goes to the engine as it came."""
