"""A real HTTP server that takes webhooks, and answers as it is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Got:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    port: int
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """What the next requests are answered with; 204 when there is none."""
    got: queue.Queue[Got] = field(default_factory=queue.Queue)
    gate: threading.Event = field(default_factory=threading.Event)
    """Closed: requests are taken, and not answered before it opens."""

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/hook"

    def next(self) -> Got:
        return self.got.get(timeout=20)


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            here.got.put(Got(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            here.gate.wait(20)
            status, headers = here.answers.pop(0) if here.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - a redirect that was followed would come as this

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Receiver(server.server_address[1])
    here.gate.set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield here
    finally:
        here.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
