"""Over real sockets: the official client, hang-ups, and the command line."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from worker.engine.engine import Engine, EngineSettings
from worker.engine.runner import ModelRunner
from worker.engine.tokenizer import ChatTokenizer

BODY = {
    "model": "base", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "ignore_eos": True,
}  # fmt: skip


@pytest.fixture
def url(engine: Engine, serve: Callable[[Engine], str]) -> str:
    return serve(engine)


@pytest.fixture
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_official_client_chats_and_streams(official: openai.OpenAI, reference: Any) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = official.chat.completions.create(
        model="base", messages=messages, temperature=0, max_tokens=30, logprobs=True, top_logprobs=2, extra_body=extra
    )
    assert whole.choices[0].token_ids == reference.greedy("hello", 30)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(
        official.chat.completions.create(
            model="base", messages=messages, temperature=0, max_tokens=30, stream=True, extra_body=extra,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [model.id for model in official.models.list()] == ["base"]


def test_official_client_raises_its_own_errors(official: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        official.chat.completions.create(model="nobody", messages=messages)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        official.chat.completions.create(model="base", messages=messages, n=2)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_slot(
    start_engine: Callable[..., Engine], model_dir: Path, serve: Callable[[Engine], str], stream: bool
) -> None:
    engine = start_engine(model_dir, max_num_seqs=1)
    url = serve(engine)
    long = BODY | {"max_tokens": 4000, "stream": stream}
    with httpx2.Client(base_url=url) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=long) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/chat/completions", json=long, timeout=httpx2.Timeout(10, read=0.05))
        # There is one slot: this answer can only begin when the first request has left it.
        response = client.post("/v1/chat/completions", json=BODY | {"max_tokens": 5})
    assert response.json()["usage"]["completion_tokens"] == 5
    assert engine.loop.generated_tokens < 4000


def test_tokens_are_streamed_as_they_come(
    start_engine: Callable[..., Engine], model_dir: Path, serve: Callable[[Engine], str]
) -> None:
    engine = start_engine(model_dir)
    url = serve(engine)
    long = BODY | {"max_tokens": 4000, "stream": True, "return_token_ids": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=long) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        next(lines)
        first = json.loads(next(lines))
        assert first["choices"][0]["token_ids"]
        assert engine.loop.generated_tokens < 4000


def test_metrics_and_unknown_routes(url: str) -> None:
    with httpx2.Client(base_url=url) as client:
        client.post("/v1/chat/completions", json=BODY | {"max_tokens": 5})
        assert "vllm:generation_tokens_total 5" in client.get("/metrics").text
        missing = client.get("/v2/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)
        assert client.get("/v1/chat/completions").status_code == 405


def test_health_follows_the_loop(
    runner: ModelRunner, failing: Any, model_dir: Path, adapters_root: Path, serve: Callable[[Engine], str]
) -> None:
    settings = EngineSettings(model=model_dir, served_model_name="base", adapters_root=adapters_root)
    broken = failing(runner, 3, ZeroDivisionError("a defect"))
    engine = Engine(settings, broken, ChatTokenizer(model_dir), {})
    engine.start()
    url = serve(engine)
    assert httpx2.get(f"{url}/health").status_code == 200
    assert httpx2.post(f"{url}/v1/chat/completions", json=BODY).status_code == 503
    assert httpx2.get(f"{url}/health").status_code == 503
    engine.close()


def test_command_line_serves_and_says_where(model_dir: Path, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter("v1")
    command = [
        sys.executable, "-m", "worker.engine", "--model", str(model_dir), "--served-model-name", "tiny", "--port", "0",
        "--adapters-root", str(adapter.parent), "--threads", "1", "--max-lora-rank", "8", "--max-loras", "2",
        "--max-model-len", "256", "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as server:
        try:
            assert server.stdout is not None
            words = server.stdout.readline().split()
            assert words[:2] == ["perennial-engine", "ready"]
            with httpx2.Client(base_url=words[2]) as client:
                assert client.get("/health").status_code == 200
                version = client.get("/version").json()
                assert version["engine"] == "perennial-embedded"
                assert version["logprobs_mode"] == "raw_logprobs"
                body = {"lora_name": "v1", "lora_path": str(adapter)}
                assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
                cards = client.get("/v1/models").json()["data"]
                assert [(card["id"], card["max_model_len"]) for card in cards] == [("tiny", 256), ("v1", 256)]
                answer = client.post("/v1/chat/completions", json=BODY | {"model": "v1", "max_tokens": 4})
                assert answer.json()["usage"]["completion_tokens"] == 4
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.parametrize("option", ["max_loras", "max_num_seqs", "max_waiting", "threads"])
def test_settings_that_would_serve_nothing(option: str) -> None:
    options: Any = {option: 0}
    with pytest.raises(ValueError, match=option):
        EngineSettings(model=Path("m"), served_model_name="m", adapters_root=Path("a"), **options)
