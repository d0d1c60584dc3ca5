"""The one error body of every route, in the shape that OpenAI's clients turn into their own exceptions."""

from __future__ import annotations

from api_schemas.base import Response


class ErrorDetail(Response):
    code: str
    """Stable and machine-readable, e.g. `adapter_not_found`."""
    message: str
    """A sentence that says what to do."""
    type: str
    """OpenAI's class of error, e.g. `invalid_request_error`."""
    param: str | None = None
    """The field or header at fault."""


class ErrorResponse(Response):
    error: ErrorDetail
