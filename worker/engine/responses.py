"""Answers in the shape of vLLM's OpenAI server."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from worker.engine.errors import EngineError
from worker.engine.generation import Step
from worker.engine.schema import ChatRequest
from worker.engine.tokenizer import ChatTokenizer

_LOWEST_LOGPROB = -9999.0  # vLLM's: JSON has no -inf

DONE = "data: [DONE]\n\n"


def error_body(error: EngineError) -> dict[str, Any]:
    """The error object of vLLM and OpenAI."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.status}}


def sse(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def completion(model: str, ids: Sequence[int], steps: Sequence[Step], *, scored: bool) -> dict[str, Any]:
    """The whole answer of /v1/completions. `scored`: the first steps are the prompt's own tokens after the first."""
    prompt, answer = (steps[: len(ids) - 1], steps[len(ids) - 1 :]) if scored else ((), steps)
    choice: dict[str, Any] = {
        "index": 0,
        "text": "".join(step.text for step in answer),
        "logprobs": None,
        "finish_reason": answer[-1].finish_reason,
        "prompt_logprobs": None,
    }
    if scored:
        rows = [{str(step.token_id): {"logprob": max(step.logprob, _LOWEST_LOGPROB)}} for step in prompt]
        choice["prompt_logprobs"] = [None, *rows]
    usage = {
        "prompt_tokens": len(ids),
        "completion_tokens": len(answer),
        "total_tokens": len(ids) + len(answer),
    }
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
    return head | {"choices": [choice], "usage": usage}


class Answer:
    """Formats the steps of one generation as a completion or as chunks; knows what the request wants to see."""

    def __init__(self, request: ChatRequest, prompt_ids: Sequence[int], tokenizer: ChatTokenizer) -> None:
        self._request = request
        self._prompt_ids = list(prompt_ids)
        self._tokenizer = tokenizer
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._generated = 0
        said = request.stream_options
        self._running_usage = said is not None and said.include_usage and said.continuous_usage_stats

    def completion(self, steps: Sequence[Step]) -> dict[str, Any]:
        """The whole answer."""
        self._generated = len(steps)
        text = "".join(step.text for step in steps)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": []},
            **self._details(steps),
        }
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}
        return body | self._prompt()

    def first_chunk(self) -> dict[str, Any]:
        """The role, and the prompt's token ids if asked for."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice]) | self._prompt()

    def chunk(self, steps: Sequence[Step]) -> dict[str, Any]:
        """The tokens of `steps`, one or more: what came since the last chunk."""
        self._generated += len(steps)
        delta = {"content": "".join(step.text for step in steps)}
        return self._chunk([{"index": 0, "delta": delta, **self._details(steps)}])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with stream_options.include_usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, generated = len(self._prompt_ids), self._generated
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        counts = {"usage": self.usage()} if self._running_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **counts}

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt_ids} if self._request.return_token_ids else {}

    def _details(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Log-probabilities, finish reason and token ids: the same in a completion and in a chunk."""
        logprobs = {"content": [self._entry(step) for step in steps]} if self._request.logprobs else None
        ids = {"token_ids": [step.token_id for step in steps]} if self._request.return_token_ids else {}
        last = steps[-1]
        return {
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
            **ids,
        }

    def _entry(self, step: Step) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in step.top]
        return self._token(step.token_id, step.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token_id)
        shown = f"token_id:{token_id}" if self._request.return_tokens_as_token_ids else text
        return {"token": shown, "logprob": max(logprob, _LOWEST_LOGPROB), "bytes": list(text.encode())}
