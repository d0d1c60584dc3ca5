"""The service as `perennial serve` runs it, with two routes more: what a request costs at least here.

`/noop` reads the body and does nothing. `/noop/checked` also looks up the key and validates the body as feedback, as
any route of the service would: what is left between it and feedback is keeping it.

`python -m benchmarks.ingest_app`, set up by the same PERENNIAL_* variables.
"""

from __future__ import annotations

from fastapi import FastAPI, Request

from api_schemas.feedback import FeedbackRequest
from service import context as contexts
from service import server
from service.app import create_app
from service.auth import FeedbackTenant, guarded
from service.settings import Settings


def with_noop(app: FastAPI) -> FastAPI:
    @app.post("/noop", status_code=202)
    async def noop(request: Request) -> dict[str, str]:
        await request.body()
        return {"status": "ok"}

    router = guarded()

    @router.post("/noop/checked", status_code=202)
    async def checked(_request: FeedbackRequest, _tenant: FeedbackTenant) -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(router)
    return app


if __name__ == "__main__":
    context = contexts.build(Settings())
    server.run(with_noop(create_app(context)), context)
