"""One request inside the engine: what it asked for, what it has produced, and when it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from worker.engine.errors import EngineError, GenerationFailedError
from worker.engine.lora import LoraWeights
from worker.engine.sampling import Draw, Sampling, new_generator
from worker.engine.text import Decoder, StoppingText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a generation ends.

    `eos_token_id` is the tokenizer's; `stop_token_ids` are further ones, reported as the stop reason. `stop` holds stop
    strings. max_tokens >= 1 counts every generated token, the one that ends the text included.
    """

    max_tokens: int
    eos_token_id: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token: `text` is what became sendable with it; `finish_reason` is set on the last one.

    `logprob` and `top` (token, log-probability) are raw: fp32 log-softmax, before temperature and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The generation ended with an error."""

    error: EngineError


Sink = Callable[[Step | Failure], None]


class Generation:
    """The state of one request. The decoding loop alone calls `accept`; any thread may set `aborted`.

    `weights` are the adapter's weights as they were when the request came in; the generation keeps them to its end.
    The first tokens of the answer are `forced`, which is how a given text is scored.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        weights: LoraWeights | None,
        sampling: Sampling,
        limits: Limits,
        top_count: int,
        decode: Decoder,
        sink: Sink,
        forced: Sequence[int] = (),
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.weights = weights
        self.sampling = sampling
        self.limits = limits
        self.top_count = top_count
        self.generator: torch.Generator | None = None
        self.aborted = False
        self._forced = tuple(forced)
        self._token_ids: list[int] = []
        self._text = StoppingText(decode, limits.stop)
        self._sink = sink

    def prepare(self, device: torch.device) -> None:
        """Called once when the request leaves the queue."""
        self.generator = new_generator(self.sampling, device)

    @property
    def last_token(self) -> int:
        return self._token_ids[-1]

    @property
    def forced_next(self) -> int | None:
        """The token that must come next whatever the model would draw."""
        at = len(self._token_ids)
        return self._forced[at] if at < len(self._forced) else None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far. The last of the answer is not in the cache yet."""
        return len(self.prompt_ids) + len(self._token_ids)

    def accept(self, draw: Draw | None) -> bool:
        """Take the next token, pass it on, and say whether the generation is over."""
        if draw is None:
            self.fail(GenerationFailedError("The model's logits are not finite numbers: the adapter is broken."))
            return True
        self._token_ids.append(draw.token_id)
        text, reason, stop_reason = self._advance(draw.token_id)
        self._send(Step(draw.token_id, draw.logprob, draw.top, text, reason, stop_reason))
        return reason is not None

    def fail(self, error: EngineError) -> None:
        """End the generation with an error."""
        self._send(Failure(error))

    def _advance(self, token_id: int) -> tuple[str, FinishReason | None, int | str | None]:
        """Text to send, finish reason and stop reason. A stop string wins over the length limit, as in vLLM."""
        limits = self.limits
        if token_id == limits.eos_token_id or token_id in limits.stop_token_ids:
            text, stop = self._text.finish()
            named = None if token_id == limits.eos_token_id else token_id
            return text, "stop", named if stop is None else stop
        text, stop = self._text.push(token_id)
        if stop is None and len(self._token_ids) >= limits.max_tokens:
            rest, stop = self._text.finish()
            text += rest
            if stop is None:
                return text, "length", None
        return text, None if stop is None else "stop", stop

    def _send(self, event: Step | Failure) -> None:
        try:
            self._sink(event)
        except RuntimeError:  # the event loop that waited for this answer is closed: nobody is listening
            self.aborted = True
