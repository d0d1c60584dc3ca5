"""An inference engine at the HTTP port: vLLM's routes with behaviour, and faults on demand.

It refuses what vLLM refuses: a taken name (400), a missing path (404), missing weights (500), an unknown model (404), a
prompt beyond the window (400). What its log-probs mean shows only when the same is asked at two temperatures. A
`cache_salt` that is not alphanumeric kills it, as CVE-2026-105756 did, and so do log-probs of a prompt. Its answers
name the model that gave them, one token per word.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2

Json = dict[str, Any]
LIKELIEST, LIKELIEST_VALUE = 99_999, -0.0625
"""Of every next token of a text."""


class FakeEngine(httpx2.AsyncBaseTransport):
    def __init__(self, base: str, *, window: int = 2048) -> None:
        self.base = base
        self.window = window
        self.adapters: dict[str, str] = {}
        """Served name -> directory."""
        self.events: list[tuple[str, str]] = []
        """("load" | "unload" | "chat" | "failed" | "done" | "aborted", served name), in order."""
        self.payloads: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.down = False
        self.sick = False
        """/health says 503."""
        self.refused: dict[str, int] = {}
        """Served name -> status of its load; loads of others go on."""
        self.refusals = 10**9
        """So many loads are refused, later ones are not."""
        self.lost_replies = 0
        """So many loads are done without their reply arriving."""
        self.break_after: int | None = None
        """Streams break off after so many tokens..."""
        self.break_by = "error"
        """... by an error event, a closed connection ("cut"), [DONE] without an end ("silent") or "garbage"."""
        self.refusing: Json | None = None
        """The error with which every stream begins, after a 200."""
        self.failing: int | None = None
        """Status of every generation, asked for and refused before any byte; 0: the connection is reset."""
        self.raw_answer: bytes | None = None
        """Given instead of a whole answer."""
        self.token_ids = True
        self.logprobs_mode = "raw_logprobs"
        """As `--logprobs-mode`."""
        self.mode_probes = 0
        """How often it was asked what its log-probs mean."""
        self.deltas: list[Json] | None = None
        """The pieces of every answer, one token each; by default words that name the model."""
        self.texts = True
        """False: no route for text completions, as in the embedded engine."""
        self.held: asyncio.Event | None = None
        """Answers stop after their second token until this is set; `stream_held` says that one does."""
        self.stream_held = threading.Event()
        self.held_load: asyncio.Event | None = None
        """Loads wait for this; `load_begun` says that one does."""
        self.load_begun = threading.Event()
        self.stuck_unloads = False
        self.probes: list[str] = []
        """Names that a token or log-probs of a prompt were asked of; not among the events."""
        self.dead = False
        """/health says 200 and nothing generates."""
        self.scores: dict[str, list[float]] = {}
        """Served name -> log-probs of a prompt's tokens after the first; others get -0.5 for each."""

    def forget(self) -> None:
        """A restart: what was loaded at run time is gone."""
        self.adapters.clear()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.down:
            raise httpx2.ConnectError("refused", request=request)
        body = json.loads(await request.aread() or b"{}")
        path = request.url.path
        if path == "/v1/load_lora_adapter":
            return await self._load(body, request)
        if path in ("/v1/chat/completions", "/v1/completions"):
            self.headers.append(dict(request.headers))
            if path == "/v1/completions" and "cache_salt" not in body:
                return self._complete(body)
            answer = self._generate(body, text=path == "/v1/completions")
            if self.held is not None and not body.get("stream"):
                await self._hold(body["model"])
            return answer
        if path == "/v1/unload_lora_adapter":
            return self._unload(body["lora_name"])
        if path == "/tokenize":
            return self._tokenize(body)
        if path == "/v1/models":
            return httpx2.Response(200, json={"object": "list", "data": self._models()})
        if path == "/health":
            return httpx2.Response(503 if self.sick else 200)
        assert path == "/version", path
        return httpx2.Response(200, json={"version": "0.32.0"})

    async def _hold(self, model: str) -> None:
        self.stream_held.set()
        try:
            await self.held.wait()  # type: ignore[union-attr]
        except asyncio.CancelledError:
            self.events.append(("aborted", model))
            raise

    def _models(self) -> list[Json]:
        base = {"id": self.base, "root": self.base, "parent": None, "max_model_len": self.window}
        return [base, *({"id": n, "root": p, "parent": self.base} for n, p in self.adapters.items())]

    async def _load(self, body: Json, request: httpx2.Request) -> httpx2.Response:
        name, path = body["lora_name"], Path(body["lora_path"])
        self.events.append(("load", name))
        if self.held_load is not None:
            self.load_begun.set()
            await self.held_load.wait()
        if name in self.refused and self.refusals > 0:
            self.refusals -= 1
            return _error(self.refused[name], "InternalServerError")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            return _error(404, f"No adapter found for {path}")
        if not (path / "adapter_model.safetensors").is_file():
            return _error(500, "no weights")
        self.adapters[name] = str(path)
        if self.lost_replies > 0:
            self.lost_replies -= 1
            raise httpx2.ReadError("connection reset", request=request)
        return httpx2.Response(200, text=f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, name: str) -> httpx2.Response:
        if self.stuck_unloads:
            return _error(500, "InternalServerError")
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        self.events.append(("unload", name))
        return httpx2.Response(200, text="Success")

    def _tokenize(self, body: Json) -> httpx2.Response:
        text = body["prompt"] if "prompt" in body else " ".join(m["content"] for m in body["messages"])
        return httpx2.Response(200, json={"count": len(text.split()), "max_model_len": self.window})

    def _generate(self, body: Json, *, text: bool) -> httpx2.Response:
        if body.get("cache_salt") == "probe":
            return self._probe(body)
        if text and not self.texts:
            return _error(404, "Not Found")
        self.payloads.append(body)
        model = body["model"]
        if not str(body["cache_salt"]).isalnum():
            self.down = True
            return _error(500, "the engine died of a salt")
        if model != self.base and model not in self.adapters:
            return _error(404, f"The model `{model}` does not exist.")
        prompt = self._prompt_of(body, text=text)
        if len(prompt) >= self.window:
            return _error(400, f"This model's maximum context length is {self.window} tokens.")
        if self.failing is not None:
            return self._fail(self.failing, model)
        self.events.append(("chat", model))
        pieces = self.deltas or [{"content": w} for w in ["I", " am", f" {model}"]]
        answer = Answer(self, body, prompt, pieces[: body.get("max_tokens", 3)], text=text)
        if body.get("stream"):
            return httpx2.Response(200, stream=_Stream(self, answer))
        if self.raw_answer is not None:
            return httpx2.Response(200, content=self.raw_answer)
        return httpx2.Response(200, json=answer.whole())

    def _fail(self, status: int, model: str) -> httpx2.Response:
        self.events.append(("failed", model))
        if not status:
            raise httpx2.ReadError("connection reset")
        return _error(status, "EngineDeadError")

    def _complete(self, body: Json) -> httpx2.Response:
        """One token for a probe; log-probs of the prompt's own tokens for a canary."""
        model, prompt = body["model"], body["prompt"]
        if self.dead:
            return _error(500, "EngineDeadError")
        if model != self.base and self.adapters.get(model) is None:
            return _error(404, f"The model `{model}` does not exist.")
        self.probes.append(model)
        choice: Json = {"index": 0, "text": "b", "finish_reason": "length"}
        if body.get("return_tokens_as_token_ids"):
            if not self.texts:
                return _error(400, "The embedded engine does not support allowed_token_ids for texts.")
            choice["logprobs"] = {"top_logprobs": [self._drawn(model, prompt, body.get("allowed_token_ids"))]}
        if body.get("prompt_logprobs") is not None:
            if self.texts:
                self.dead = True
                return _error(500, "EngineCore encountered an issue.")
            values = self.scores.get(model, [-0.5] * (len(prompt) - 1))
            rows = [{str(t): {"logprob": v, "rank": 1}} for t, v in zip(prompt[1:], values, strict=True)]
            choice["prompt_logprobs"] = [None, *rows]
        return httpx2.Response(200, json={"id": "cmpl-engine", "model": model, "choices": [choice]})

    def _drawn(self, model: str, prompt: list[int], allowed: list[int] | None) -> Json:
        """The token behind a prompt: `LIKELIEST` where any may be drawn, else the first that is allowed."""
        value = self.scores.get(model, [-0.5] * 2**12)[len(prompt) - 1]
        values = {t: LIKELIEST_VALUE if t == LIKELIEST else value for t in allowed or [LIKELIEST]}
        if self.logprobs_mode.startswith("processed") and allowed:
            total = math.log(sum(map(math.exp, values.values())))
            values = {t: v - total for t, v in values.items()}
        return {f"token_id:{t}": v for t, v in values.items()}

    def _prompt_of(self, body: Json, *, text: bool) -> list[int]:
        if text and isinstance(body["prompt"], list):
            return list(body["prompt"])
        read = [body["prompt"]] if text else [m["content"] for m in body["messages"]]
        return [1, *(len(w) for words in read for w in words.split())]

    def _probe(self, body: Json) -> httpx2.Response:
        """Twenty tokens, each half a nat less likely than the one before it."""
        self.mode_probes += 1
        heat = body["temperature"] if self.logprobs_mode.startswith("processed") else 1.0
        logits = [8.0 - i / 2 / heat for i in range(20)]
        total = 0.0 if self.logprobs_mode.endswith("logits") else math.log(sum(map(math.exp, logits)))
        top = [{"token": str(i), "logprob": v - total} for i, v in enumerate(logits[: body["top_logprobs"]])]
        choice = {"index": 0, "message": {"content": "0"}, "logprobs": {"content": [top[0] | {"top_logprobs": top}]}}
        return httpx2.Response(200, json={"choices": [choice]})

    async def chunks(self, answer: Answer) -> AsyncIterator[bytes]:
        if self.refusing is not None:
            yield _event({"error": self.refusing})
            yield b"data: [DONE]\n\n"
            return
        for choice in answer.openings():
            yield _event(choice)
        for at in range(len(answer.pieces)):
            if at == self.break_after:
                yield self._broken()
                return
            if at == 2 and self.held is not None:
                self.stream_held.set()
                await self.held.wait()
            for index in range(answer.n):
                yield _event(answer.chunk(at, index))
        if answer.streamed("include_usage"):
            yield _event(answer.head | {"choices": [], "usage": answer.usage()})
        yield b"data: [DONE]\n\n"

    def _broken(self) -> bytes:
        if self.break_by == "cut":
            raise httpx2.ReadError("connection reset")
        broken = {"error": b'data: {"error": {"message": "CUDA error"}}\n\n', "garbage": b'data: {"choices": 7}\n\n'}
        return broken.get(self.break_by, b"") + b"data: [DONE]\n\n"


class Answer:
    """One answer of `n` choices; choice i's token ids are 100 i above those of the first."""

    def __init__(self, engine: FakeEngine, body: Json, prompt: list[int], pieces: list[Json], *, text: bool) -> None:
        self.engine, self.body, self.prompt, self.pieces, self.text = engine, body, prompt, pieces, text
        self.n = int(body.get("n", 1))
        kind = "text_completion" if text else "chat.completion.chunk"
        self.head = {"id": "chatcmpl-engine", "model": body["model"], "object": kind}
        self.ids = engine.token_ids and bool(body.get("return_token_ids"))

    def whole(self) -> Json:
        choices = [self._choice(range(len(self.pieces)), i) | self._said() for i in range(self.n)]
        answer = {"id": "chatcmpl-engine", "model": self.body["model"], "choices": choices, "usage": self.usage()}
        return answer if self.text else answer | self._prompt()

    def _said(self) -> Json:
        joined: Json = {}
        for piece in self.pieces:
            for key, value in piece.items():
                joined[key] = joined[key] + value if key in joined else value
        if self.text:
            return {"text": joined["content"]} | self._prompt()
        return {"message": {"role": "assistant", "content": None} | joined}

    def openings(self) -> list[Json]:
        if self.text:
            return []
        role: Json = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.head | {"choices": [role | {"index": i}]} | self._prompt() for i in range(self.n)]

    def chunk(self, at: int, index: int) -> Json:
        choice = self._choice(range(at, at + 1), index)
        if self.text:
            choice |= {"text": self.pieces[at].get("content", "")} | (self._prompt() if at == 0 else {})
        else:
            choice["delta"] = self.pieces[at]
        counts = {"usage": self.usage(at + 1)} if self.streamed("continuous_usage_stats") else {}
        return self.head | {"choices": [choice]} | counts

    def streamed(self, option: str) -> bool:
        return bool((self.body.get("stream_options") or {}).get(option))

    def _choice(self, tokens: range, index: int) -> Json:
        last = tokens.stop == len(self.pieces)
        called = any("tool_calls" in piece for piece in self.pieces)
        choice: Json = {"index": index, "logprobs": None, "finish_reason": None}
        if last:
            choice |= {"finish_reason": "tool_calls" if called else "stop", "stop_reason": None}
        values = [-0.25 * (t + 1) for t in tokens]
        if self.text and self.body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": values, "tokens": [str(t) for t in tokens]}
        elif self.body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": str(t), "logprob": -0.25 * (t + 1)} for t in tokens]}
        if self.ids:
            choice["token_ids"] = [100 * (index + 1) + t for t in tokens]
        return choice

    def _prompt(self) -> Json:
        return {"prompt_token_ids": self.prompt} if self.ids else {}

    def usage(self, pieces: int | None = None) -> Json:
        """Of the whole answer, or after so many pieces of one choice."""
        prompt, made = len(self.prompt), self.n * len(self.pieces) if pieces is None else pieces
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, engine: FakeEngine, answer: Answer) -> None:
        self._engine, self._model, self._ended = engine, answer.body["model"], False
        self._chunks = engine.chunks(answer)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk
        self._ended = True
        self._engine.events.append(("done", self._model))

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.events.append(("aborted", self._model))


def _event(body: Json) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def _error(status: int, message: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "type": "error", "code": status}})
