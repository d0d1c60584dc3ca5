"""The gateway before a real vLLM: what it captures is vLLM's own, and clients cannot tell the two apart."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from demo.run import BASE_MODEL
from tests.vllm.asked import CHATS, PLACES, STRICT_TOOLS, TALK, TEXTS, TOOLS, UNBROKEN, Json
from tests.vllm.conftest import THINKING
from tests.vllm.front import Front
from tests.vllm.server import VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def front(vllm: VllmServer, make_front: Callable[[str], Front]) -> Front:
    return make_front(vllm.url)


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


JOINED = ("choices", "delta", "logprobs", "finish_reason")


def joined(chunks: list[Json]) -> Json:
    """All that one choice's chunks say. Where an answer is cut is chance: a busy vLLM puts several tokens in one."""
    out: Json = {"said": {}, "calls": {}, "tokens": [], "ends": [], "besides": []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta, logprobs = choice["delta"], choice["logprobs"] or {}
        for call in delta["tool_calls"] or ():
            known = out["calls"].setdefault(call["index"], {"id": False, "type": None, "name": "", "arguments": ""})
            function = call["function"] or {}
            known |= {"id": known["id"] or call["id"], "type": known["type"] or call["type"]}
            known |= {k: known[k] + (function.get(k) or "") for k in ("name", "arguments")}
        for part in delta.keys() - {"tool_calls"}:
            out["said"][part] = out["said"].get(part, "") + (delta[part] or "")
        out["tokens"] += logprobs.get("content") or []
        out["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        besides = {k: v for k, v in (chunk | choice).items() if k not in JOINED}
        out["besides"] += [besides] if besides not in out["besides"] else []
    return out


@pytest.mark.parametrize("name", CHATS)
def test_openais_client_sees_in_a_stream_what_vllm_itself_sends(front: Front, name: str) -> None:
    extra = {
        "top_k", "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "bad_words",
        "spaces_between_special_tokens", "allowed_token_ids", "stream_interval", "return_tokens_as_token_ids",
        "repetition_detection",
    }  # fmt: skip
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
        assert joined(ours) == joined(own)
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


def test_each_chunk_says_the_counts_so_far(front: Front) -> None:
    """vLLM's own counts: of the tokens up to this chunk, however they are cut into chunks."""
    body: Json = {"messages": TALK[:2], "temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": True}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    so_far, said = 0, []
    for chunk in front.streamed("/v1/chat/completions", body):
        for choice in chunk["choices"]:
            so_far += len((choice["logprobs"] or {}).get("content") or ())
        said.append((chunk["usage"]["completion_tokens"], so_far))
    assert all(count == tokens for count, tokens in said), said
    assert said[0][0] == 0
    assert said[-1][0] == 6


@dataclass
class Turn:
    """One streamed answer, as the `openai` client puts it together."""

    asked: Json
    id: str = ""
    text: str = ""
    calls: list[Json] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def take(self, chunk: Any) -> None:
        self.id = chunk.id
        for choice in chunk.choices:
            self.text += choice.delta.content or ""
            self.values += [entry.logprob for entry in (choice.logprobs.content if choice.logprobs else None) or ()]
            self.ends += [choice.finish_reason] if choice.finish_reason else []
            for piece in choice.delta.tool_calls or ():
                if piece.index == len(self.calls):
                    self.calls.append({"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}})
                function = self.calls[piece.index]["function"]
                function["name"] += piece.function.name or ""
                function["arguments"] += piece.function.arguments or ""

    def seen(self) -> Json:
        """All but the call's ids, which are made anew for each answer."""
        return {"text": self.text, "calls": [c["function"] for c in self.calls], "ends": self.ends}


def conversed(client: openai.OpenAI) -> list[Turn]:
    """An agent's turns: a call of the named function, its result, any call, its result, an answer in words."""
    messages, turns = TALK[:2], list[Turn]()
    named: Json = {"type": "function", "function": {"name": "weather"}}
    for choice, result in ((named, "12 °C, Föhn 🌬️"), ("required", "高潮 21:00"), ("none", "")):
        body: Json = {"messages": messages, "tools": STRICT_TOOLS, "tool_choice": choice, "temperature": 0}
        turn = Turn(body | {"max_tokens": 160, "logit_bias": UNBROKEN})
        for chunk in client.chat.completions.create(model=BASE_MODEL, stream=True, logprobs=True, **turn.asked):
            turn.take(chunk)
        turns.append(turn)
        if result:
            call = turn.calls[0] | {"id": f"call_{len(turns)}"}  # alike on both sides
            messages = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return turns


def test_a_streamed_conversation_with_tool_calls_is_vllms_own_and_kept(front: Front) -> None:
    """vLLM forces the calls' JSON, so the demonstration model makes whole calls, with places beyond ASCII."""
    talks: dict[str, list[Turn]] = {}
    for side in ("direct", "gateway"):
        with front.openai(side) as client:
            talks[side] = conversed(client)
    for own, ours in zip(talks["direct"], talks["gateway"], strict=True):
        assert ours.seen() == own.seen()
        assert ours.values == pytest.approx(own.values, abs=2e-5)
        row, whole = front.kept(ours.id), front.own("/v1/chat/completions", ours.asked)
        assert row["prompt_token_ids"] == whole["prompt_token_ids"]
        assert row["response_token_ids"] == whole["choices"][0]["token_ids"]
        assert row["logprobs"] == pytest.approx(ours.values, abs=1e-9)
        assert (row["reply"] or {}).get("tool_calls", []) == ours.calls
        assert row["response"] == ours.text
    first, second, last = talks["gateway"]
    assert first.calls[0]["function"]["name"] == "weather"
    assert json.loads(first.calls[0]["function"]["arguments"])["place"] in PLACES
    assert [c["function"]["name"] in ("weather", "tide") for c in second.calls] == [True]
    assert json.loads(second.calls[0]["function"]["arguments"])
    assert not last.calls
    assert last.text


def eventually(what: Callable[[], bool], why: str, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, why
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_the_generation_in_vllm(vllm: VllmServer, front: Front, stream: bool) -> None:
    """The engine is held while the news travels: no answer comes to its end because a machine is slow."""
    labels = '{engine="0",model_name="perennial-demo"}'
    running, generated = f"vllm:num_requests_running{labels}", f"vllm:generation_tokens_total{labels}"
    choices, tokens = 16, 900
    body = {"model": BASE_MODEL, "messages": TALK[:2], "max_tokens": tokens, "n": choices, "ignore_eos": True}
    before, mark = front.metric(generated), vllm.logged()
    client = http.client.HTTPConnection("127.0.0.1", front.stack.port, timeout=120)
    headers = {"authorization": f"Bearer {front.stack.api_key}", "content-type": "application/json"}
    client.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream}), headers)
    if stream:
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
    else:
        eventually(lambda: front.metric(generated) > before + choices, "nothing was generated")
    with vllm.held():
        client.close()
        gone = re.compile(r"Request \S*chatcmpl-\S+ aborted")  # no probe: those end as well
        eventually(lambda: gone.search(vllm.log_from(mark)) is not None, "vLLM was not told that nobody listens")
    eventually(lambda: front.metric(running) == 0, "the generation went on")
    assert front.metric(generated) - before < choices * tokens, "it ran to its end"


def test_vllms_refusals_are_honest_errors(front: Front) -> None:
    def refused(**fields: Any) -> Json:
        answer = front.gateway.post("/v1/chat/completions", json={"model": BASE_MODEL, "messages": TALK[:2]} | fields)
        assert answer.status_code == 422, answer.text
        return dict(answer.json()["error"])

    long = refused(messages=[{"role": "user", "content": "apple " * 2000}])
    assert long["code"] == "context_length_exceeded"
    for stream in (False, True):
        grammar = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        assert "nonsense" in refused(stream=stream, response_format=grammar)["message"], "said within a stream of 200"
        assert refused(stream=stream, stop_token_ids=[99_999])["param"] == "stop_token_ids"
    assert "thinking_token_budget" in refused(thinking_token_budget=3)["message"], "without --reasoning-config"
    wrong = {"type": "function", "function": {"name": "nothing"}}
    assert "tool" in refused(tools=TOOLS, tool_choice=wrong)["message"]


def test_a_server_of_processed_log_probs_is_recognised(
    second_vllm: VllmServer, make_front: Callable[[str], Front]
) -> None:
    """Then the values are the policy that drew the answer, at any temperature."""
    front = make_front(second_vllm.url)
    body = {"messages": TALK[:2], "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 8}
    row = front.kept(front.streamed("/v1/chat/completions", body)[0]["id"])
    assert row["logprobs_mode"] == "processed_logprobs"
    own = front.own("/v1/chat/completions", body)["choices"][0]
    assert row["logprobs"] == pytest.approx([e["logprob"] for e in own["logprobs"]["content"]], abs=2e-5)


def test_reasoning_that_has_used_up_its_budget_is_ended(
    second_vllm: VllmServer, make_front: Callable[[str], Front]
) -> None:
    front = make_front(second_vllm.url)
    body = {"messages": TALK[:2], "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    texts = []
    for budget in (-1, 3):
        row = front.kept(front.streamed("/v1/chat/completions", body | {"thinking_token_budget": budget})[0]["id"])
        own = front.own("/v1/chat/completions", body | {"thinking_token_budget": budget})["choices"][0]
        assert row["response_token_ids"] == own["token_ids"]
        assert row["sampling"]["thinking_token_budget"] == budget
        texts.append(row["response"])
    free, ended = texts
    assert THINKING["reasoning_end_str"] in ended
    assert THINKING["reasoning_end_str"] not in free


def test_seeds_at_the_ends_of_64_bits_are_vllms_own(front: Front) -> None:
    for seed, n in ((-(2**63), 1), (2**63 - 3, 3), (-9, 3)):
        body = {"messages": TALK[:2], "temperature": 1.0, "seed": seed, "n": n, "max_tokens": 8}
        own = front.own("/v1/chat/completions", body)
        ours = front.gateway.post("/v1/chat/completions", json={"model": BASE_MODEL} | body).json()
        assert [c["message"]["content"] for c in ours["choices"]] == [c["message"]["content"] for c in own["choices"]]
