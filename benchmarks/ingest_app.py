"""The service as `perennial serve` runs it, with one route more that does nothing: what a request costs at least here.

`python -m benchmarks.ingest_app`, set up by the same PERENNIAL_* variables.
"""

from __future__ import annotations

from fastapi import FastAPI, Request

from service import context as contexts
from service import server
from service.app import create_app
from service.settings import Settings


def with_noop(app: FastAPI) -> FastAPI:
    @app.post("/noop", status_code=202)
    async def noop(request: Request) -> dict[str, str]:
        await request.body()
        return {"status": "ok"}

    return app


if __name__ == "__main__":
    context = contexts.build(Settings())
    server.run(with_noop(create_app(context)), context)
