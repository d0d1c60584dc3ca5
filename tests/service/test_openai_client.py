"""OpenAI's own client against the service behind a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import openai
import pytest
import uvicorn

from service.app import create_app
from service.context import Context
from service.store.keys import CLIENT_SCOPES
from tests.service.fake_engine import FakeEngine
from tests.service.harness import Json

USER = [{"role": "user", "content": "who are you"}]


class Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self.listening.set()

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}/v1"


@pytest.fixture
def client(make_context: Callable[..., tuple[Context, FakeEngine]]) -> Iterator[openai.OpenAI]:
    context, _ = make_context()
    with context.database.write() as s:
        key = context.keys.create(s, tenant="dora", name="test", scopes=CLIENT_SCOPES)
    server = Server(uvicorn.Config(create_app(context), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        assert server.listening.wait(20)
        with openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) as made:
            yield made
    finally:
        server.should_exit = True
        thread.join(20)


def test_openais_client_speaks_to_the_service(client: openai.OpenAI) -> None:
    client.post("/adapters", body={"name": "helper"}, cast_to=object)
    answer = client.chat.completions.create(model="helper", messages=USER)  # type: ignore[arg-type]
    assert (answer.model, answer.choices[0].message.content) == ("helper@v0", "I am tiny/base")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3

    chunks = list(client.chat.completions.create(model="helper", messages=USER, stream=True))  # type: ignore[call-overload]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I am tiny/base"
    assert chunks[-1].choices[0].finish_reason == "stop"

    body: Json = {"items": [{"completion_id": chunks[0].id, "feedback": "say more"}]}
    sent = client.post("/feedback", body=body, cast_to=object, options={"headers": {"idempotency-key": "one"}})
    assert isinstance(sent, dict)
    assert (sent["status"], sent["adapter"]) == ("queued", "helper")
    assert [m.id for m in client.models.list()] == ["tiny/base", "helper"]


def test_errors_become_openais_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=USER)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError) as unknown:
        client.chat.completions.create(model="tiny/base", messages=USER, extra_body={"priority": 1})  # type: ignore[arg-type]
    assert unknown.value.code == "unknown_parameter"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    client.post("/adapters", body={"name": "helper"}, cast_to=object)
    with pytest.raises(openai.ConflictError) as twice:
        client.with_options(max_retries=2).post("/adapters", body={"name": "helper"}, cast_to=object)
    assert twice.value.response.headers["x-should-retry"] == "false"
