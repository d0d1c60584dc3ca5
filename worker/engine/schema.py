"""Request bodies: vLLM's names and defaults. Unknown fields are ignored, as vLLM does; fields of vLLM that would change
the answer and that this engine does not compute are refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from worker.engine.errors import BadRequestError

MAX_TOP_LOGPROBS = 20  # vLLM's --max-logprobs default

# Field -> the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "stream_interval": (1,),
    "include_reasoning": (True,),
    "logprob_token_ids": ([],),
    "prompt_logprobs": (),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
}

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=1)]


class TextPart(BaseModel):
    """One part of a message; only text is served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: str | list[TextPart] | None = None

    def rendered(self) -> dict[str, str]:
        """What the chat template sees; parts are joined by line breaks, as in vLLM."""
        if isinstance(self.content, list):
            return {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions. None means the default of vLLM or of the model's generation_config.json."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Raise BadRequestError for what cannot be served as asked, naming the field."""
        for field, value in (self.model_extra or {}).items():
            if value is not None and field in _NEUTRAL and value not in _NEUTRAL[field]:
                raise BadRequestError(f"The embedded engine does not support {field}; leave it out.", param=field)
        for message in self.messages:
            if any((message.model_extra or {}).get(field) for field in ("tool_calls", "function_call")):
                raise BadRequestError("The embedded engine does not support tool calls.", param="messages")
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if "" in self.stops:
            raise BadRequestError("stop cannot contain an empty string.", param="stop")
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream: true.", param="stream_options")


class CompletionRequest(BaseModel):
    """POST /v1/completions, as far as probes and scoring need it: one whole answer, greedy unless told otherwise."""

    model: str
    prompt: str | Annotated[list[int], Field(min_length=1)]
    max_tokens: TokenCount = 16
    temperature: Literal[0] = 0
    prompt_logprobs: Literal[0] | None = None
    """0: the log-prob of every prompt token itself; the most likely others are not computed."""
    logprobs: Literal[0] | None = None
    """Taken, for the service's probe asks for it of every engine; none are given."""
    stream: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _no_client(cls, body: Any) -> Any:
        """Token ids are what the gateway asks for on behalf of a client, who may want any of vLLM's fields."""
        if not isinstance(body, dict):
            return body
        if body.get("return_token_ids"):
            raise BadRequestError("The embedded engine does not support text completions; use chat.", param="prompt")
        for field in body.keys() - cls.model_fields.keys():
            if body[field] is not None:
                raise BadRequestError(f"The embedded engine does not support {field} for texts.", param=field)
        return body


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)


class TokenizeRequest(BaseModel):
    """POST /tokenize: either a plain text or a conversation, as in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self
