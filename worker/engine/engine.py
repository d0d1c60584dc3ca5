"""The engine without HTTP: a base model, its adapters by name, and requests turned into generations."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from worker.engine.adapter_files import read_adapter
from worker.engine.errors import BadRequestError, NotFoundError
from worker.engine.generation import Generation, Limits, Sink
from worker.engine.loop import DecodeLoop
from worker.engine.lora import LoraWeights
from worker.engine.registry import AdapterRegistry
from worker.engine.runner import ModelRunner, load_runner
from worker.engine.sampling import Sampling
from worker.engine.schema import ChatRequest, CompletionRequest, TokenizeRequest
from worker.engine.tokenizer import ChatTokenizer, generation_defaults


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to serve a model directory. The names are vLLM's options where vLLM has them.

    `max_num_seqs` requests run at once, with at most `max_loras` different adapters among them; `max_waiting` more may
    wait. Adapters are loaded only from below `adapters_root`.
    """

    model: Path
    served_model_name: str
    adapters_root: Path
    device: Literal["cpu", "cuda", "auto"] = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    max_model_len: int | None = None
    max_lora_rank: int = 64
    max_loras: int = 8
    max_num_seqs: int = 16
    max_waiting: int = 256
    threads: int | None = None

    def __post_init__(self) -> None:
        for option in ("max_lora_rank", "max_loras", "max_num_seqs", "max_waiting", "threads"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, not {value}.")


class Engine:
    """Serves one base model and its adapters. Call `start` once, `close` at the end."""

    def __init__(
        self,
        settings: EngineSettings,
        runner: ModelRunner,
        tokenizer: ChatTokenizer,
        defaults: Mapping[str, Any],
    ) -> None:
        self.name = settings.served_model_name
        self.tokenizer = tokenizer
        self.max_model_len = runner.max_model_len
        self._settings = settings
        self._runner = runner
        self._defaults = defaults
        self._created = int(time.time())
        self._adapters = AdapterRegistry(settings.adapters_root, self._read_adapter, reserved=self.name)
        self.loop = DecodeLoop(runner, max_loras=settings.max_loras, max_waiting=settings.max_waiting)

    def start(self) -> None:
        self.loop.start()

    def close(self) -> None:
        self.loop.close()

    def load_adapter(self, name: str, path: str) -> None:
        """Serve the PEFT directory `path` as `name`; blocks while reading. Raises as AdapterRegistry.load."""
        self._adapters.load(name, path, int(time.time()))

    def unload_adapter(self, name: str) -> None:
        """Forget `name`; requests in flight finish with the weights they started with. Raises NotFoundError."""
        self._adapters.unload(name)

    def models(self) -> list[dict[str, Any]]:
        """The base model and every adapter in the shape of vLLM's /v1/models."""
        base = self._card(self.name, str(self._settings.model), None, self._created)
        return [base, *(self._card(it.name, it.path, self.name, it.created) for it in self._adapters.list())]

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Token ids as a chat with the same messages would have them, or of a plain text. Raises as `submit`."""
        if request.model is not None:
            self._weights_of(request.model)
        if request.messages is None:
            return self.tokenizer.text_ids(request.prompt or "", special=request.add_special_tokens is not False)
        messages = [message.rendered() for message in request.messages]
        return self.tokenizer.prompt_ids(messages, generation_prompt=request.add_generation_prompt)

    def submit(self, request: ChatRequest, sink: Sink) -> Generation:
        """Start answering; the tokens go to `sink`, called on the decoding thread.

        Raises BadRequestError, NotFoundError (unknown model), QueueFullError or EngineDeadError.
        """
        weights = self._weights_of(request.model)
        request.check()
        messages = [message.rendered() for message in request.messages]
        self._check_size(sum(len(message["content"]) for message in messages))
        prompt_ids = self.tokenizer.prompt_ids(messages)
        generation = Generation(
            prompt_ids,
            weights=weights,
            sampling=self._sampling(request),
            limits=self._limits(request, len(prompt_ids)),
            top_count=(request.top_logprobs or 0) if request.logprobs else 0,
            decode=self.tokenizer.decode,
            sink=sink,
        )
        self.loop.submit(generation)
        return generation

    def _check_size(self, characters: int) -> None:
        """Refuse what cannot fit before it is tokenised: 30 MB take a minute, and nobody is served meanwhile."""
        bound = self.max_model_len * self.tokenizer.longest_token
        if characters > bound:
            raise BadRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens, at most {bound} characters. "
                f"However, your messages have {characters} characters.",
                param="messages",
            )

    def complete(self, request: CompletionRequest, sink: Sink) -> tuple[Generation, list[int]]:
        """Start a completion; returns it and the prompt's ids. With `prompt_logprobs` the answer begins with the steps
        of the prompt's own tokens after the first. Raises as `submit`."""
        weights = self._weights_of(request.model)
        ids = (
            self.tokenizer.text_ids(request.prompt, special=True) if isinstance(request.prompt, str) else request.prompt
        )
        if not ids or not all(0 <= i < self._runner.vocabulary for i in ids):
            raise BadRequestError("The prompt is empty or holds ids that are no tokens of this model.", param="prompt")
        if len(ids) + request.max_tokens > self.max_model_len:
            raise BadRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens: shorten the prompt.",
                param="prompt",
            )
        start = 1 if request.prompt_logprobs is not None else len(ids)
        forced = ids[start:]
        generation = Generation(
            ids[:start],
            weights=weights,
            sampling=Sampling(temperature=request.temperature),
            limits=Limits(max_tokens=len(forced) + request.max_tokens),
            top_count=0,
            decode=self.tokenizer.decode,
            sink=sink,
            forced=forced,
        )
        self.loop.submit(generation)
        return generation, ids

    def _weights_of(self, model: str) -> LoraWeights | None:
        if model == self.name:
            return None
        adapter = self._adapters.get(model)
        if adapter is None:
            raise NotFoundError(f"The model `{model}` does not exist.", param="model")
        return adapter.weights

    def _sampling(self, request: ChatRequest) -> Sampling:
        fallback = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        wanted = {
            field: _first(getattr(request, field), self._defaults.get(field), neutral)
            for field, neutral in fallback.items()
        }
        return Sampling(**wanted, seed=None if request.seed == -1 else request.seed)

    def _limits(self, request: ChatRequest, prompt: int) -> Limits:
        room = self.max_model_len - prompt
        wanted = request.token_limit
        if prompt < 1 or room < (wanted or 1):
            asked = "" if wanted is None else f" and asks for {wanted} more"
            raise BadRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. "
                f"The prompt has {prompt} tokens{asked}: shorten the prompt or lower max_tokens.",
                param="messages" if room < 1 else "max_tokens",
            )
        further = self._defaults.get("eos_token_id") or ()
        ends = {further} if isinstance(further, int) else set(further)
        return Limits(
            max_tokens=wanted or min(room, self._defaults.get("max_new_tokens") or room),
            eos_token_id=None if request.ignore_eos else self.tokenizer.eos_token_id,
            stop_token_ids=frozenset(request.stop_token_ids or ()) | (frozenset() if request.ignore_eos else ends),
            stop=request.stops,
        )

    def _read_adapter(self, path: Path) -> LoraWeights:
        runner, rank = self._runner, self._settings.max_lora_rank
        return read_adapter(path, runner.shapes, max_rank=rank, dtype=runner.dtype, device=runner.device)

    def _card(self, name: str, root: str, parent: str | None, created: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "perennial",
            "root": root,
            "parent": parent,
            "max_model_len": self.max_model_len,
        }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def open_engine(settings: EngineSettings) -> Engine:
    """Load the model directory; the engine is not started yet. Raises UnsupportedModelError."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    runner, _ = load_runner(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        slots=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
    )
    return Engine(settings, runner, ChatTokenizer(settings.model), generation_defaults(settings.model))
