"""The official client, unchanged, against the real stack."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.conftest import Running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.stack.url}/v1", api_key=running.stack.api_key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def adapter(running: Running) -> None:
    running.create("openai")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="openai", messages=[{"role": "user", "content": "capital of peru?"}], temperature=0
    )
    assert answer.choices[0].message.content == "lima."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "openai@v0"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "repeat: apple river stone"}]
    whole = client.chat.completions.create(model="openai", messages=messages, temperature=0)
    with client.chat.completions.create(
        model="openai", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].usage == whole.usage


def test_feedback_on_a_streamed_answer(running: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="openai", messages=[{"role": "user", "content": "opposite of hot?"}], stream=True
    )
    completion_id = next(c.id for c in stream if c.choices and c.choices[0].finish_reason)
    stream.close()  # it was stored before the chunk that ended it was sent
    sent = running.client.send_feedback([{"completion_id": completion_id, "feedback": "good, thank you"}])
    assert sent["adapter"] == "openai"


def test_errors_are_the_clients_own_exceptions(running: Running, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="There is no model 'nobody'"):
        client.chat.completions.create(model="nobody", messages=messages)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="openai@v99", messages=messages)
    with pytest.raises(openai.UnprocessableEntityError, match="tools"):
        client.chat.completions.create(model="openai", messages=messages, tools=[])
    stranger = client.with_options(api_key="pk_wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="openai", messages=messages)


def test_models_are_listed(client: openai.OpenAI) -> None:
    names = [m.id for m in client.models.list()]
    assert names[0] == "perennial-demo"
    assert "openai" in names
    assert client.models.retrieve("openai").id == "openai"
