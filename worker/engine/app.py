"""The HTTP surface: vLLM's routes, field names, status codes and error body, as far as Perennial uses them."""

import asyncio
from collections.abc import AsyncIterator
from importlib import metadata

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from worker.engine.engine import Engine
from worker.engine.errors import BadRequestError, EngineError
from worker.engine.generation import Failure, Generation, Step
from worker.engine.responses import DONE, Answer, completion, error_body, sse
from worker.engine.schema import ChatRequest, CompletionRequest, LoadRequest, TokenizeRequest, UnloadRequest

_CLIENT_GONE = 499


class TokenStream:
    """Carries the steps of one generation from the decoding thread to the coroutine that answers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Step | Failure] = asyncio.Queue()

    def put(self, event: Step | Failure) -> None:
        """Called on the decoding thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> list[Step]:
        """All steps that have arrived, at least one. Raises the generation's error."""
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        steps: list[Step] = []
        for event in events:
            if isinstance(event, Failure):
                raise event.error
            steps.append(event)
        return steps

    async def all(self) -> list[Step]:
        """Every step to the end."""
        steps = await self.next()
        while steps[-1].finish_reason is None:
            steps += await self.next()
        return steps


def create_app(engine: Engine) -> FastAPI:
    """The server of `engine`, which the caller starts and closes."""
    app = FastAPI(title="Perennial embedded engine", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app)
    _add_information(app, engine)
    _add_adapters(app, engine)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        stream = TokenStream()
        generation = engine.submit(body, stream.put)
        answer = Answer(body, generation.prompt_ids, engine.tokenizer)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(generation, stream, answer, include_usage=usage)
            # The background task runs even when the client hung up before the first chunk was asked for.
            return StreamingResponse(
                events, media_type="text/event-stream", background=BackgroundTask(_abort, generation)
            )
        steps = await _unless_gone(request, generation, stream)
        return Response(status_code=_CLIENT_GONE) if steps is None else JSONResponse(answer.completion(steps))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        stream = TokenStream()
        generation, ids = engine.complete(body, stream.put)
        steps = await _unless_gone(request, generation, stream)
        if steps is None:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(completion(body.model, ids, steps, scored=body.prompt_logprobs is not None))

    return app


def _add_information(app: FastAPI, engine: Engine) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.loop.alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": _version(), "engine": "perennial-embedded", "logprobs_mode": "raw_logprobs"}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": engine.models()}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, object]:
        tokens = engine.tokenize(body)
        return {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": None}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        running, waiting = engine.loop.counts
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running {running}",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting {waiting}",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total {engine.loop.generated_tokens}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")


def _add_adapters(app: FastAPI, engine: Engine) -> None:
    # Plain functions: they run on a worker thread, so that reading files delays no stream.
    @app.post("/v1/load_lora_adapter")
    def load(body: LoadRequest) -> PlainTextResponse:
        if body.load_inplace:
            raise BadRequestError(
                "load_inplace is not supported: give each version its own name.", param="load_inplace"
            )
        engine.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(body: UnloadRequest) -> PlainTextResponse:
        engine.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(EngineError)
    async def engine_error(_request: Request, error: EngineError) -> JSONResponse:
        return JSONResponse(error_body(error), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # What is not JSON has an offset for a location, and no field.
        location = first["loc"][1:] if first["type"] != "json_invalid" else ()
        field = ".".join(str(part) for part in location)
        refused = BadRequestError(f"{field or 'body'}: {first['msg']}", param=field or None)
        return JSONResponse(error_body(refused), status_code=refused.status)

    @app.exception_handler(HTTPException)
    async def no_route(_request: Request, error: HTTPException) -> JSONResponse:
        body = {"message": error.detail, "type": "NotFoundError", "param": None, "code": error.status_code}
        return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)


async def _events(
    generation: Generation, stream: TokenStream, answer: Answer, *, include_usage: bool
) -> AsyncIterator[str]:
    """The chunks of a streamed answer. Closing it, which a disconnect does, aborts the generation."""
    try:
        yield sse(answer.first_chunk())
        finished = False
        while not finished:
            steps = await stream.next()
            finished = steps[-1].finish_reason is not None
            yield sse(answer.chunk(steps))
        if include_usage:
            yield sse(answer.usage_chunk())
        yield DONE
    except EngineError as error:
        # The status line is long gone; vLLM puts the error into the stream as well.
        yield sse(error_body(error))
        yield DONE
    finally:
        generation.aborted = True


async def _unless_gone(request: Request, generation: Generation, stream: TokenStream) -> list[Step] | None:
    """The whole answer, or None when the client hung up first: then the generation is aborted."""
    answered = asyncio.ensure_future(stream.all())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await answered if answered.done() else None
    finally:
        generation.aborted = True
        answered.cancel()
        gone.cancel()


async def _abort(generation: Generation) -> None:
    generation.aborted = True


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _version() -> str:
    try:
        return metadata.version("perennial")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
