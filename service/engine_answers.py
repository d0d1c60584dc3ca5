"""What engines answer, read: bodies, streams, and their errors as ours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import httpx2
import orjson

from service.errors import EngineError, TooMany, Unavailable, Unprocessable
from service.sse import data_blocks

Json = dict[str, Any]


class ModelNotLoaded(Unavailable):
    """The engine does not know the served name (any more): load it and ask again."""

    code = "model_not_served"


class EngineAway(Unavailable):
    """No connection, or one that broke."""

    code = "engine_unavailable"


class EngineBusy(Unavailable):
    """The engine's own 503."""

    code = "engine_busy"


class EngineFull(TooMany):
    """The engine's own 429."""

    code = "engine_busy"


class EngineFailed(EngineError):
    """The engine's own failure, be it a status or an end before the end: another engine may do better."""


class LoadRefused(Exception):
    """The engine sees this adapter's files and cannot load them (vLLM: 500 for what it cannot read)."""


async def events(response: httpx2.Response) -> AsyncIterator[list[Json]]:
    """The chunks of a stream, those that came together in one list.

    To the very end of the body, which comes right behind [DONE]: only then is the connection used again.
    """
    done = begun = False
    try:
        async for block in data_blocks(response.aiter_raw()):
            found: list[Json] = []
            for data in block:
                done = done or data == b"[DONE]"
                if done:
                    break
                event = parsed(data)
                if event.get("error") is not None:
                    if found:
                        yield found
                    raise _broken_off(event["error"], begun)
                found.append(with_choices(event))
                begun = True
            if found:
                yield found
    except ValueError as error:
        raise EngineError("The engine's answer cannot be read.") from error
    if not done:
        raise EngineFailed("The engine's answer ended early; try again.")


def _broken_off(about: Any, begun: bool) -> Unprocessable | EngineFailed:
    """vLLM looks at much of a streamed request only after it has said 200: its first event is the refusal then."""
    if not begun and isinstance(about, dict) and about.get("code") in (400, 422):
        return _unfit(str(about.get("message"))[:500], str(about.get("param") or ""))
    return EngineFailed("The engine broke off this answer; try again.")


def json_of(response: httpx2.Response) -> Json:
    """The JSON object of a 200; what else there is raises as `refuse`."""
    if response.status_code != 200:
        refuse(response)
    return parsed(response.content)


def parsed(text: bytes) -> Json:
    """A JSON object. NaN and Infinity are no JSON: they could neither be stored nor passed on."""
    try:
        found = orjson.loads(text)
    except ValueError as error:
        raise EngineError("The engine's answer cannot be read.") from error
    if not isinstance(found, dict):
        raise EngineError("The engine's answer cannot be read.")
    return found


def with_choices(answer: Json) -> Json:
    """`answer`, if it has a list of choices; a stream's usage comes with an empty one."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise EngineError("The engine's answer has no choices.")
    return answer


def refuse(response: httpx2.Response) -> NoReturn:
    """An engine's error as one of ours. Its text passes on only where it is about the caller's own request."""
    status, message = response.status_code, detail(response, "message")
    if status == 404 and message == "Not Found":  # the route, not the model
        raise Unprocessable("This engine does not do this kind of request.", code="unsupported_by_engine")
    if status == 404:
        raise ModelNotLoaded("The engine does not serve this model at present; try again.", retry_after=2)
    if status in (400, 422):
        raise _unfit(message, detail(response, "param"))
    if status == 429:
        raise EngineFull("The engine is busy; try again.", retry_after=1)
    if status == 503:
        raise EngineBusy("The engine is busy; try again.", retry_after=1)
    raise EngineFailed("The engine failed on this request; try again.")


def _unfit(message: str, param: str) -> Unprocessable:
    return Unprocessable(message, code=_refusal_code(message), param=param[:128] or None)


def _refusal_code(message: str) -> str:
    if "maximum context length" in message or "context_length" in message:
        return "context_length_exceeded"
    return "unsupported_by_engine" if "does not support" in message else "invalid_request"


def detail(response: httpx2.Response, field: str) -> str:
    """A field of the engine's error; of what is no error object, the text itself as `message`."""
    try:
        found = response.json()
    except ValueError:
        found = response.text
    about = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
    if isinstance(about, dict):
        said = about.get(field)
        return "" if said is None else str(said)[:500]
    return str(about)[:500] if field == "message" else ""
