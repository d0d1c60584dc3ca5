"""The one exception tree of the service. `service.app` maps it to answers; nothing else knows HTTP."""

from __future__ import annotations

from typing import ClassVar


class PerennialError(Exception):
    """Base: a status, a stable code and a sentence that says what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after


class BadRequest(PerennialError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class Unauthenticated(PerennialError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(PerennialError):
    status, type, code = 403, "permission_error", "missing_scope"


class NotFound(PerennialError):
    """Absent or another tenant's: the answer is the same."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Gone(PerennialError):
    """It was there, and is not any more."""

    status, type, code = 410, "invalid_request_error", "version_removed"


class Conflict(PerennialError):
    """Permanent: the same request will fail again."""

    status, type, code = 409, "conflict_error", "conflict"


class LeaseLost(Conflict):
    """The fencing token is not the adapter's newest any more: nothing was changed."""

    code = "lease_lost"


class Unprocessable(PerennialError):
    status, type, code = 422, "invalid_request_error", "invalid_request"


class VersionRejected(Unprocessable):
    """Admission refused a version; `message` names the reason."""

    code = "version_rejected"


class TooLarge(PerennialError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class TooMany(PerennialError):
    status, type, code = 429, "rate_limit_error", "over_quota"


class EngineError(PerennialError):
    """The inference engine answered something we cannot pass on."""

    status, type, code = 502, "server_error", "engine_error"


class Unavailable(PerennialError):
    """A part that is needed is away; the request may be sent again."""

    status, type, code = 503, "server_error", "unavailable"
