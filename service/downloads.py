"""Files to download, in ranges; what cannot be given is said as every other error."""

from __future__ import annotations

from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from service.problems import RouteError, error_body

REFUSALS = {
    400: RouteError("The Range header cannot be read: write 'bytes=0-99'.", code="invalid_range"),
    416: RouteError("The file is shorter: 'content-range' says how long it is.", code="range_not_satisfiable"),
}


class Download(FileResponse):
    """Starlette answers a bad `Range` with plain text or nothing; here it is an error with a code."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: JSONResponse | None = None

        async def passed(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in REFUSALS:
                status, length = message["status"], Headers(raw=message["headers"]).get("content-range")
                kept = {"content-range": length} if length else {}
                refusal = JSONResponse(error_body(REFUSALS[status]), status, kept)
            elif refusal is None:
                await send(message)

        await super().__call__(scope, receive, passed)
        if refusal is not None:
            await refusal(scope, receive, send)
