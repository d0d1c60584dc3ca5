"""The service as `perennial serve` runs it, and beside it what a request costs at least here, in the same process.

| path | what it does | what is around it |
|---|---|---|
| `/noop` | reads the body, does nothing: the aim is held against it | as around any route of the service |
| `/noop/checked` | looks up the key and validates the body as feedback: what is left is keeping it | the same |
| `/noop/alone` | as `/noop` | nothing: the only route of an application of its own |
| `/noop/bare` | as `/noop` | nothing, not even a framework: uvicorn alone |

`python -m benchmarks.ingest_app`, set up by the same PERENNIAL_* variables.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api_schemas.feedback import FeedbackRequest
from service import context as contexts
from service import server
from service.app import create_app
from service.auth import FeedbackTenant, guarded
from service.settings import Settings

NOOP, CHECKED, ALONE, BARE = "/noop", "/noop/checked", "/noop/alone", "/noop/bare"


async def nothing(request: Request) -> dict[str, str]:
    await request.body()
    return {"status": "ok"}


def with_noop(app: FastAPI) -> ASGIApp:
    app.post(NOOP, status_code=202)(nothing)
    router = guarded()

    @router.post(CHECKED, status_code=202)
    async def checked(_request: FeedbackRequest, _tenant: FeedbackTenant) -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(router)
    alone = FastAPI()
    alone.post(ALONE, status_code=202)(nothing)
    beside: dict[str, ASGIApp] = {ALONE: alone, BARE: bare}

    async def either(scope: Scope, receive: Receive, send: Send) -> None:
        await beside.get(scope.get("path", ""), app)(scope, receive, send)

    return either


async def bare(_scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body", False):
        pass
    body = b'{"status":"ok"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    context = contexts.build(Settings())
    server.run(with_noop(create_app(context)), context)
