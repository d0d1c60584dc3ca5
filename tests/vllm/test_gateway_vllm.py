"""The gateway before a real vLLM: what it captures is vLLM's own, and clients cannot tell the two apart."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import text

from demo.run import BASE_MODEL, MODEL_DIR
from service.db.engine import Database
from service.local import LocalConfig, LocalStack
from tests.vllm.server import VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Json = dict[str, Any]
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place, now.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
TALK: list[Json] = [
    {"role": "system", "content": "Kurz und höflich. 🌦 日本語も可。"},
    {"role": "user", "content": "weather in Zürich? 🌧️"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "12 °C, Föhn"},
    {"role": "assistant", "content": "12 °C — bitte schön 🙂"},
    {"role": "user", "content": "capital of peru?"},
]


def _wait_for(url: str, stack: LocalStack, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert stack.alive("service"), stack.tail("service")
        try:
            if httpx2.get(url, timeout=2.0).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    raise AssertionError(stack.tail("service"))


class Front:
    """The service before one vLLM, both to be asked the same."""

    def __init__(self, vllm_url: str, stack: LocalStack) -> None:
        self.vllm_url, self.stack = vllm_url, stack
        self.direct = httpx2.Client(base_url=vllm_url, timeout=120)
        self.gateway = httpx2.Client(
            base_url=stack.url, timeout=120, headers={"authorization": f"Bearer {stack.api_key}"}
        )
        self._database = Database(f"sqlite:///{stack.data / 'perennial.db'}")

    def own(self, path: str, body: Json) -> Json:
        """vLLM's own whole answer, with everything about its tokens."""
        known = {"return_token_ids": True, "logprobs": body.get("logprobs", 0) if "prompt" in body else True}
        answer = self.direct.post(path, json={"model": BASE_MODEL} | body | known)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def streamed(self, path: str, body: Json) -> list[Json]:
        """The gateway's chunks."""
        with self.gateway.stream("POST", path, json={"model": BASE_MODEL, "stream": True} | body) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]", lines[-1]
        return [json.loads(line) for line in lines[:-1]]

    def kept(self, rollout_id: str) -> Json:
        with self._database.read() as s:
            found = s.execute(text("SELECT * FROM rollouts WHERE id = :id"), {"id": rollout_id}).mappings().one()
        lists = ("messages", "tools", "reply", "prompt_token_ids", "response_token_ids", "logprobs", "sampling")
        return dict(found) | {k: json.loads(found[k]) if found[k] else None for k in lists}

    def openai(self, name: str) -> openai.OpenAI:
        url, key = (self.vllm_url, "none") if name == "direct" else (self.stack.url, self.stack.api_key)
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def metric(self, name: str) -> float:
        found = re.findall(rf"^{re.escape(name)} (\S+)$", self.direct.get("/metrics").text, re.MULTILINE)
        return float(found[0])

    def close(self) -> None:
        for each in (self.direct, self.gateway, self._database):
            each.close()


@pytest.fixture(scope="module")
def make_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Front]]:
    made: list[Front] = []

    def make(vllm_url: str) -> Front:
        settings = {"PERENNIAL_ENGINE_URL": vllm_url}
        data = tmp_path_factory.mktemp("front")
        stack = LocalStack(LocalConfig(data, MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=settings))
        stack.start("service")
        _wait_for(f"{stack.url}/healthz", stack)
        made.append(Front(vllm_url, stack))
        return made[-1]

    yield make
    for front in made:
        front.close()
        front.stack.stop()


@pytest.fixture(scope="module")
def front(vllm: VllmServer, make_front: Callable[[str], Front]) -> Front:
    return make_front(vllm.url)


CHATS: dict[str, Json] = {
    "multi-turn, unicode": {"messages": TALK, "tools": TOOLS, "temperature": 0, "max_tokens": 24},
    "sampled": {"messages": TALK[:2], "temperature": 1.0, "seed": 7, "max_tokens": 24},
    "cold and filtered": {"messages": TALK[:2], "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 24},
    "stop string": {"messages": [{"role": "user", "content": "repeat: apple river"}], "stop": " riv", "temperature": 0},
    "forced tool": {
        "messages": TALK[:2], "tools": TOOLS, "temperature": 0, "max_tokens": 40,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "json": {
        "messages": TALK[:2], "temperature": 0, "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
            "additionalProperties": False}}},
    },
    "penalised": {
        "messages": TALK[:2], "temperature": 0, "frequency_penalty": 1.0, "presence_penalty": 0.5,
        "repetition_penalty": 1.2, "logit_bias": {"16": 3}, "min_tokens": 8, "ignore_eos": True, "max_tokens": 12,
        "skip_special_tokens": False,
    },
    "three choices": {"messages": TALK[:2], "temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 12},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_what_is_captured_of_a_stream_is_vllms_own(front: Front, name: str) -> None:
    body = CHATS[name]
    own = front.own("/v1/chat/completions", body)
    chunks = front.streamed("/v1/chat/completions", body)
    for choice in own["choices"]:
        index = choice["index"]
        row = front.kept(chunks[0]["id"] + (f"-{index}" if index else ""))
        assert row["prompt_token_ids"] == own["prompt_token_ids"]
        assert row["response_token_ids"] == choice["token_ids"]
        assert row["logprobs"] == pytest.approx([e["logprob"] for e in choice["logprobs"]["content"]], abs=2e-5)
        assert row["finish_reason"] == choice["finish_reason"]
        assert row["logprobs_mode"] == "raw_logprobs"
        if "tool_choice" not in body:  # of a call that was cut short vLLM shows less in a stream
            assert row["response"] == (choice["message"]["content"] or "")
        assert row["tools"] == body.get("tools")
    assert len({c["choices"][0]["index"] for c in chunks}) == len(own["choices"])
    assert not any("token_ids" in c["choices"][0] or c["choices"][0]["logprobs"] for c in chunks)


TEXTS: dict[str, Json] = {
    "text": {"prompt": "Zürich 🌧️: capital of", "temperature": 0, "max_tokens": 10},
    "token ids": {"prompt": [1, 1919, 201, 2161], "temperature": 1.0, "seed": 5, "max_tokens": 10, "logprobs": 2},
    "choices": {"prompt": "capital of peru?", "temperature": 1.0, "seed": 5, "n": 2},
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_completions_are_captured_alike(front: Front, name: str) -> None:
    own = front.own("/v1/completions", TEXTS[name])
    chunks = front.streamed("/v1/completions", TEXTS[name])
    for choice in own["choices"]:
        row = front.kept(chunks[0]["id"] + (f"-{choice['index']}" if choice["index"] else ""))
        assert row["prompt_token_ids"] == choice["prompt_token_ids"]
        assert row["response_token_ids"] == choice["token_ids"]
        assert row["logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=2e-5)
        shown = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in shown) == choice["text"] == row["response"]


def plain(chunk: Any, values: list[float]) -> Json:
    """A chunk without what differs from request to request; its log-probs go to `values`."""
    made: Json = chunk.model_dump(exclude={"id", "created", "model", "system_fingerprint", "perennial"})
    for choice in made["choices"]:
        for part in ("token_ids", "stop_reason"):
            choice.pop(part, None)
        for call in (choice.get("delta") or choice.get("message") or {}).get("tool_calls") or ():
            call["id"] = bool(call.get("id"))
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            values += [token.pop("logprob") for token in (entry, *entry["top_logprobs"])]
    for extra in ("prompt_token_ids", "prompt_text", "metrics", "service_tier"):
        made.pop(extra, None)
    return made


@pytest.mark.parametrize("name", CHATS)
def test_openais_client_sees_in_a_stream_what_vllm_itself_sends(front: Front, name: str) -> None:
    extra = {"top_k", "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens"}
    body = {k: v for k, v in CHATS[name].items() if k not in extra}
    body |= {"logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}
    body["extra_body"] = {k: v for k, v in CHATS[name].items() if k in extra}
    seen: dict[str, list[Json]] = {}
    values: dict[str, list[float]] = {"direct": [], "gateway": []}
    for side in ("direct", "gateway"):
        with front.openai(side) as client:
            seen[side] = [plain(c, values[side]) for c in client.chat.completions.create(model=BASE_MODEL, **body)]
    # Finish chunks wait for the store: with several choices they come behind the others' last words.
    for index in range(body.get("n", 1)):
        own, ours = ([c for c in seen[s] if c["choices"] and c["choices"][0]["index"] == index] for s in seen)
        assert ours == own
    # Sorted: the choices' chunks may be interleaved in another way.
    assert sorted(values["gateway"]) == pytest.approx(sorted(values["direct"]), abs=2e-5)
    assert seen["gateway"][-1] == seen["direct"][-1]
    assert seen["gateway"][-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", ["forced tool", "three choices", "multi-turn, unicode"])
def test_openais_client_sees_in_a_whole_answer_what_vllm_itself_sends(front: Front, name: str) -> None:
    seen: dict[str, Json] = {}
    values: dict[str, list[float]] = {"direct": [], "gateway": []}
    for side in ("direct", "gateway"):
        with front.openai(side) as client:
            answer = client.chat.completions.create(model=BASE_MODEL, logprobs=True, **CHATS[name])
            seen[side] = plain(answer, values[side])
    for answer in seen.values():
        answer["usage"] = {k: answer["usage"][k] for k in ("prompt_tokens", "completion_tokens")}
        for choice in answer["choices"]:
            choice.pop("routed_experts", None)
            message = choice["message"]
            choice["message"] = {k: message.get(k) for k in ("role", "content", "tool_calls") if message.get(k)}
        answer.pop("prompt_logprobs", None)
        answer.pop("kv_transfer_params", None)
        answer.pop("ec_transfer_params", None)
    assert seen["gateway"] == seen["direct"]
    assert values["gateway"] == pytest.approx(values["direct"], abs=2e-5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_the_generation_in_vllm(front: Front, stream: bool) -> None:
    labels = '{engine="0",model_name="perennial-demo"}'
    running, generated = f"vllm:num_requests_running{labels}", f"vllm:generation_tokens_total{labels}"
    before = front.metric(generated)
    body = {"model": BASE_MODEL, "messages": TALK[:2], "max_tokens": 900, "ignore_eos": True, "stream": stream}
    url = f"{front.stack.url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {front.stack.api_key}"}
    if stream:
        with httpx2.Client() as client, client.stream("POST", url, json=body, headers=headers) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url, json=body, headers=headers, timeout=0.7)
    until = time.monotonic() + 20
    while front.metric(running) or front.metric(generated) == before:
        assert time.monotonic() < until, "the generation went on"
        time.sleep(0.05)
    assert front.metric(generated) - before < 800, "it ran to its end"


def test_vllms_refusals_are_honest_errors(front: Front) -> None:
    def refused(**fields: Any) -> Json:
        answer = front.gateway.post("/v1/chat/completions", json={"model": BASE_MODEL, "messages": TALK[:2]} | fields)
        assert answer.status_code == 422, answer.text
        return dict(answer.json()["error"])

    long = refused(messages=[{"role": "user", "content": "apple " * 2000}])
    assert long["code"] == "context_length_exceeded"
    wrong = {"type": "function", "function": {"name": "nothing"}}
    assert "tool" in refused(tools=TOOLS, tool_choice=wrong)["message"]


def test_a_server_of_processed_log_probs_is_recognised(
    make_vllm: Callable[..., VllmServer], make_front: Callable[[str], Front]
) -> None:
    """Then the values are the policy that drew the answer, at any temperature."""
    with make_vllm(flags=("--logprobs-mode", "processed_logprobs")) as server:
        front = make_front(server.url)
        body = {"messages": TALK[:2], "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 8}
        row = front.kept(front.streamed("/v1/chat/completions", body)[0]["id"])
        assert row["logprobs_mode"] == "processed_logprobs"
        own = front.own("/v1/chat/completions", body)["choices"][0]
        assert row["logprobs"] == pytest.approx([e["logprob"] for e in own["logprobs"]["content"]], abs=2e-5)
