"""Real service processes around a fake engine that listens on a port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.local import free_port
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Caller

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


def wait_for(what: str, found: Callable[[], object], patience: float = PATIENCE) -> None:
    """Until it is so; the machine may be busy."""
    until = time.monotonic() + patience
    while not found():
        assert time.monotonic() < until, f"in vain: {what}"
        time.sleep(0.02)


@contextmanager
def listening(engine: FakeEngine) -> Iterator[str]:
    """The engine's URL, for as long as the block runs."""

    async def answer(request: Request) -> Response:
        url = httpx2.URL(str(request.url))
        asked = httpx2.Request(request.method, url, content=await request.body(), headers=dict(request.headers))
        given = await engine.handle_async_request(asked)
        return Response(await given.aread(), given.status_code, media_type=given.headers.get("content-type"))

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for("the engine", lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


class ServiceProcess:
    """`perennial serve` with these settings; killed with the block."""

    def __init__(self, settings: Mapping[str, object], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        changes = {f"PERENNIAL_{k.upper()}": str(v) for k, v in ({"port": self.port} | dict(settings)).items()}
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"],
                cwd=ROOT, env={**os.environ, **changes}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.client = httpx2.Client(base_url=self.url, timeout=30.0)

    def caller(self, key: str) -> Caller:
        return Caller(self.client, key)  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        return self.process.pid

    def answers(self) -> bool:
        assert self.process.poll() is None, "the service ended"
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Until SIGCONT; it stands still when this returns."""
        self.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_for("it frozen", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def end(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
