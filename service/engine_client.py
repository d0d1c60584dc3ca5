"""The one client of the inference engine: vLLM's HTTP protocol, spoken by vLLM and by the embedded engine alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, cast, get_args

import httpx2

from service.engine_answers import EngineAway, LoadRefused, detail, events, json_of, refuse, with_choices
from service.engine_scores import Alternatives, alternatives, draw_payload, score
from service.engine_transport import EngineTransport
from service.errors import EngineError, PerennialError, Unavailable, Unprocessable
from service.logprobs_mode import Mode, judged, probe_payload, top_values

CONTROL_TIMEOUT = 120.0
"""Seconds for loading an adapter; loads of large ones are slow."""

PROBE_TIMEOUT = 15.0
"""Seconds for one token."""

GENERATING = ("/v1/chat/completions", "/v1/completions")
"""What clients wait for: these requests go to the transport as they are. Cookies, redirects and the joining of URLs, of
which an engine needs nothing, take httpx2's client 0.6 ms of computing per request."""


class _NotByThisEngine(Exception):
    """It says so itself: the embedded one draws nothing for a text, and scores prompts beside any other request."""


class EngineClient:
    """One engine, over one pool of connections.

    Every method raises Unavailable when the engine does not answer.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        logprobs_mode: Mode | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        self._transport = transport or EngineTransport()
        self._http = httpx2.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=5.0),
            transport=self._transport,
        )
        self._generating = {path: httpx2.URL(base_url.rstrip("/") + path) for path in GENERATING}
        self._headers = httpx2.Headers(headers | {"content-type": "application/json"})
        self._extensions = {"timeout": self._http.timeout.as_dict()}
        self._known_mode = logprobs_mode
        self._mode: Mode | None = None
        self._probing = asyncio.Lock()
        self._windows: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> dict[str, dict[str, Any]]:
        """Everything that the engine can answer as, by name; `root` of an adapter is its directory."""
        response = await self._call("GET", "/v1/models", timeout=5.0)
        body = json_of(response)
        try:
            known = {str(m["id"]): dict(m) for m in body["data"]}
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError("The engine's list of models cannot be read.") from error
        lengths = {name: m.get("max_model_len") for name, m in known.items()}
        self._windows = {name: length for name, length in lengths.items() if isinstance(length, int)}
        return known

    async def window(self, model: str) -> int | None:
        """Most tokens of prompt and answer together, as the engine said last; None if it does not say."""
        if model not in self._windows:
            await self.models()
        return self._windows.get(model)

    async def healthy(self) -> bool:
        try:
            response = await self._call("GET", "/health", timeout=5.0)
        except Unavailable:
            return False
        return response.status_code == 200

    async def logprobs_mode(self, model: str) -> Mode:
        """What this engine's log-probs mean: as set, as the engine says, or found out once per start of the engine.

        `unknown` where it cannot be found out: nothing is trained on such values.
        """
        if (known := self._known_mode or self._mode) is not None:
            return known
        async with self._probing:
            if self._mode is None:
                try:
                    self._mode = await self._probed_mode(model)
                except PerennialError:
                    return "unknown"  # asked again with the next answer
            return self._mode

    async def _probed_mode(self, model: str) -> Mode:
        said = json_of(await self._call("GET", "/version", timeout=5.0)).get("logprobs_mode")
        for mode in get_args(Mode):
            if said == mode:
                return cast(Mode, mode)
        plain, hot = [await self.generate("/v1/chat/completions", probe_payload(model, t)) for t in (1.0, 2.0)]
        try:
            return judged(top_values(plain), top_values(hot))
        except (LookupError, TypeError, ValueError):
            return "unknown"

    async def load(self, name: str, path: str) -> None:
        """Load an adapter directory under a never-reused name. Already loaded from there counts as done.

        Raises LoadRefused when the engine will not have it; Unavailable also when it does not see the files, which is
        a fault of its mounts and not of the adapter.
        """
        body = {"lora_name": name, "lora_path": path}
        response = await self._call("POST", "/v1/load_lora_adapter", json=body, timeout=CONTROL_TIMEOUT)
        if response.status_code == 200:
            return
        if response.status_code == 400 and (await self.models()).get(name, {}).get("root") == path:
            return
        if response.status_code in (400, 500):
            raise LoadRefused(detail(response, "message"))
        if response.status_code in (403, 404):
            raise Unavailable(
                f"The engine finds no adapter at {path}: does it have the adapters directory?", code="engine_files"
            )
        refuse(response)

    async def unload(self, name: str) -> None:
        """Drop the name; requests that run on it finish. A name that is not there counts as done."""
        response = await self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30.0)
        if response.status_code not in (200, 404):
            refuse(response)

    async def count_tokens(self, model: str, prompt: str | list[dict[str, str]]) -> int:
        """Length of a plain text, or of a conversation with its generation header, in the model's tokens."""
        body: dict[str, Any] = {"model": model}
        if isinstance(prompt, str):
            body |= {"prompt": prompt, "add_special_tokens": False}
        else:
            body |= {"messages": prompt}
        count = json_of(await self._call("POST", "/tokenize", json=body, timeout=30.0)).get("count")
        if not isinstance(count, int):
            raise EngineError("The engine did not count the tokens.")
        return count

    async def score(self, model: str, token_ids: list[int]) -> list[float]:
        """Raw log-prob of every token but the first, given those before it. Safe while the engine answers others."""
        if (mode := await self.logprobs_mode(model)) in ("raw_logprobs", "processed_logprobs"):
            with suppress(_NotByThisEngine):
                return await score(partial(self._draw, model), mode, token_ids)
        return await self.score_prompt(model, token_ids)

    async def score_prompt(self, model: str, token_ids: list[int]) -> list[float]:
        """The same in one request: only of an engine that answers nobody else (`service.engine_scores` says why)."""
        payload = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await self._call("POST", "/v1/completions", json=payload, timeout=CONTROL_TIMEOUT)
        choice = json_of(answer)["choices"][0]
        try:
            rows = choice["prompt_logprobs"][1:]
            return [float(row[str(t)]["logprob"]) for t, row in zip(token_ids[1:], rows, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError("The engine's log-probs of a prompt cannot be read.") from error

    async def _draw(self, model: str, prompt: list[int], allowed: list[int] | None) -> Alternatives:
        payload = draw_payload(model, prompt, allowed)
        answer = await self._call("POST", "/v1/completions", json=payload, timeout=CONTROL_TIMEOUT)
        try:
            return alternatives(json_of(answer))
        except Unprocessable as error:
            raise (_NotByThisEngine() if error.code == "unsupported_by_engine" else error) from error
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError("The engine's log-probs of a token cannot be read.") from error

    async def probe(self, model: str) -> None:
        """One generated token: the only proof that an engine lives. Raises EngineError when it gives none."""
        # With a log-prob: at their first use vLLM compiles for seconds, for which the first client is not to wait.
        payload = {"model": model, "prompt": "a", "max_tokens": 1, "temperature": 0, "logprobs": 0}
        try:
            body = json_of(await self._call("POST", "/v1/completions", json=payload, timeout=PROBE_TIMEOUT))
        except Unprocessable as error:
            raise EngineError(f"The engine does not answer a one-token request: {error.message}") from error
        if not body.get("choices"):
            raise EngineError("The engine generated nothing.")

    async def generate(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One whole answer. Raises ModelNotLoaded, Unprocessable (with the engine's reason), EngineError."""
        async with self._answer(path, payload) as response:
            await response.aread()
            body = with_choices(json_of(response))
        if not body["choices"]:
            raise EngineError("The engine's answer has no choices.")
        return body

    @asynccontextmanager
    async def stream(self, path: str, payload: dict[str, Any]) -> AsyncIterator[AsyncIterator[list[dict[str, Any]]]]:
        """The chunks of one answer as they come, those that came together in one list.

        Leaving the block early aborts the generation.
        """
        async with self._answer(path, payload) as response:
            if response.status_code != 200:
                await response.aread()
                refuse(response)
            yield events(response)

    @asynccontextmanager
    async def _answer(self, path: str, payload: dict[str, Any]) -> AsyncIterator[httpx2.Response]:
        """The engine's answer to one of GENERATING, not read yet; leaving the block early closes its connection."""
        request = httpx2.Request(
            "POST",
            self._generating[path],
            headers=self._headers,
            content=json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(),
            extensions=self._extensions,
        )
        try:
            response = await self._transport.handle_async_request(request)
            response.request = request
            try:
                yield response
            finally:
                await response.aclose()
        except httpx2.RequestError as error:
            raise self._away(error) from error

    async def _call(self, method: str, path: str, **kwargs: Any) -> httpx2.Response:
        try:
            return await self._http.request(method, path, **kwargs)
        except httpx2.RequestError as error:
            raise self._away(error) from error

    def _away(self, error: httpx2.RequestError) -> Unavailable:
        if isinstance(error, httpx2.ReadTimeout):
            return Unavailable("The engine took too long; ask for fewer tokens.", code="engine_timeout", retry_after=5)
        self._mode = None  # it may come back as another
        return EngineAway("The inference engine does not answer; try again.", retry_after=2)
