"""The application, built from its arguments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from api_schemas.errors import ErrorResponse
from service import problems
from service.context import Context
from service.door import FeedbackDoor
from service.middleware import Limits, RequestIds
from service.routes import adapters, chat, erasure, feedback, health, jobs, messages, models, uploads, webhooks, worker

PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
"""What answers without a key; a test holds every other route to having a guard."""


class Application(FastAPI):
    """What is around every request stands around the framework too: what need not go through it does not."""

    def surround(self, context: Context) -> None:
        self._outermost = RequestIds(Limits(FeedbackDoor(super().__call__, context), context.settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outermost(scope, receive, send)


def create_app(context: Context) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        background = [asyncio.create_task(part.run()) for part in (context.publisher, context.sender)]
        try:
            yield
        finally:
            context.stopping.set()
            for task in background:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await context.ingest.close()  # what was taken is on disk before we go
            await context.callers.close()
            await context.publisher.office.resign()
            await context.serving.close()
            context.database.close()

    app = Application(
        title="Perennial",
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    app.state.context = context
    for router in (
        chat.router,
        messages.router,
        models.router,
        feedback.router,
        erasure.router,
        jobs.router,
        adapters.router,
        uploads.router,
        webhooks.router,
        worker.router,
        health.router,
    ):
        app.include_router(router)
    app.surround(context)
    problems.install(app)
    return app
