"""How the application is served."""

from __future__ import annotations

from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from service.context import Context

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """Says that it is about to end as soon as it is told to: what waits or streams for long then ends by itself."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._context.stopping.set()
        super().handle_exit(sig, frame)


def run(app: ASGIApp, context: Context) -> None:
    """Until SIGTERM or SIGINT; requests that run then have ten seconds to end."""
    settings = context.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    server = Server(config, context)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise SystemExit(3)  # uvicorn's own status for it; its log says why
