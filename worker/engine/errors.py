"""Everything the engine refuses or fails on. `app` maps these to vLLM's error body; nothing else does."""


class EngineError(Exception):
    """Base of all errors of the engine; the message says what to do. `status` is the HTTP status it becomes."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequestError(EngineError):
    """The request can never succeed as it stands."""

    status = 400
    type = "BadRequestError"


class ForbiddenPathError(EngineError):
    """An adapter path outside the adapters root (vLLM has no such check)."""

    status = 403
    type = "ForbiddenError"


class NotFoundError(EngineError):
    """An unknown model, adapter or adapter path."""

    status = 404
    type = "NotFoundError"


class AdapterLoadError(EngineError):
    """An adapter that is there but cannot be served: permanent, 500 as in vLLM; a retry does not help."""


class GenerationFailedError(EngineError):
    """One generation failed (non-finite logits, out of memory); other requests are not affected."""


class QueueFullError(EngineError):
    """Too many requests are waiting; retry later."""

    status = 503
    type = "ServiceUnavailableError"


class EngineDeadError(EngineError):
    """The decoding loop has stopped; only a restart of the process helps. `/health` says so too."""

    status = 503
    type = "ServiceUnavailableError"


class UnsupportedModelError(EngineError):
    """A base model that this engine would serve wrongly; raised at start-up, never over HTTP."""
