"""Several fake engines behind one transport, told apart by host."""

from __future__ import annotations

import httpx2

from tests.service import peft_files
from tests.service.fake_engine import FakeEngine


class FakeFleet(httpx2.AsyncBaseTransport):
    def __init__(self, size: int) -> None:
        self.engines = [FakeEngine(peft_files.BASE) for _ in range(size)]

    @property
    def urls(self) -> str:
        return ",".join(f"http://engine-{i}:8000" for i in range(len(self.engines)))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        number = int(request.url.host.removeprefix("engine-"))
        return await self.engines[number].handle_async_request(request)

    def chats(self) -> list[int]:
        """Answers given by each."""
        return [sum(1 for kind, _ in e.events if kind == "chat") for e in self.engines]
