"""Errors out: the one place that turns exceptions into answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api_schemas.errors import ErrorDetail, ErrorResponse
from api_schemas.sampling import REFUSED
from service import anthropic
from service.errors import BadRequest, PerennialError, Unavailable, Unprocessable

log = logging.getLogger(__name__)


ANTHROPIC_PATH = "/v1/messages"
UNFORESEEN = "Something went wrong on our side; it has been logged."


class InternalError(PerennialError):
    """A defect of ours."""


class RouteError(PerennialError):
    """No such route or method; `code` says which."""

    type = "invalid_request_error"


def error_body(error: PerennialError) -> dict[str, Any]:
    detail = ErrorDetail(code=error.code, message=error.message, type=error.type, param=error.param)
    return ErrorResponse(error=detail).model_dump()


def body_for(path: str, error: PerennialError) -> dict[str, Any]:
    """The error as the clients of this route know errors."""
    return anthropic.error_body(error) if path == ANTHROPIC_PATH else error_body(error)


def answer(
    request: Request, error: PerennialError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    headers, path = dict(headers or {}), request.scope["path"]
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 409:
        headers["x-should-retry"] = "false"  # OpenAI's clients repeat a 409 otherwise
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    status = status or error.status
    if path == ANTHROPIC_PATH and status == 422:
        status = 400  # Anthropic knows no other
    return JSONResponse(body_for(path, error), status, headers)


def from_validation(errors: Sequence[Any]) -> PerennialError:
    """The first fault, by field; the caller's own value is not repeated."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return BadRequest("The body is not valid JSON.", code="invalid_json")
    where = [str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "constrained-"))]
    param = _printable(".".join(where) or str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        why = REFUSED.get(where[0]) if len(where) == 1 else None
        message = f"'{param}' is not taken: {why}." if why else f"Unknown parameter '{param}': leave it out."
        return Unprocessable(message, code="unknown_parameter", param=param)
    if first["type"] == "missing":
        return Unprocessable(f"'{param}' is required.", code="missing_parameter", param=param)
    if param == "body" and first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return Unprocessable(
            "The body must be a JSON object, sent with 'content-type: application/json'.",
            code="invalid_parameter",
            param=param,
        )
    reason = str(first["msg"]).removeprefix("Value error, ")
    return Unprocessable(f"'{param}': {reason}.", code="invalid_parameter", param=param)


def of_storage(error: OSError) -> PerennialError:
    """Logged here; the caller learns no paths."""
    log.error("storage: %s", error)
    return Unavailable("Our storage fails or is full; try again later.", code="storage_unavailable", retry_after=30)


def of_defect(error: Exception) -> PerennialError:
    """What nobody foresaw, logged here."""
    log.error("unforeseen error", exc_info=error)
    return InternalError(UNFORESEEN)


def _printable(name: str) -> str:
    """A field's name as the caller wrote it, cut short, without what JSON in UTF-8 cannot hold (lone surrogates)."""
    return name[:128].encode(errors="replace").decode()


def install(app: FastAPI) -> None:
    """Map our tree, FastAPI's validation, Starlette's routing errors and everything unforeseen."""

    @app.exception_handler(PerennialError)
    async def _ours(request: Request, error: PerennialError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _routing(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "route_not_found", 405: "method_not_allowed", 400: "invalid_json"}.get(
            error.status_code, "http_error"
        )
        routed = RouteError(f"{error.detail}.".replace("..", "."), code=code)
        return answer(request, routed, error.status_code, error.headers)

    @app.exception_handler(OSError)
    async def _storage(request: Request, error: OSError) -> JSONResponse:
        return answer(request, of_storage(error))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(request, of_defect(error))
