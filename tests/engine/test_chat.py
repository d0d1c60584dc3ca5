"""POST /v1/chat/completions: shapes, streaming, how answers end, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from worker.engine.app import create_app
from worker.engine.engine import Engine

HELLO = [{"role": "user", "content": "hello"}]
END = 2  # <|im_end|>


@pytest.fixture
def chain_client(start_engine: Callable[..., Engine], chain_dir: Any) -> Callable[[str], TestClient]:
    """A client of a model that always gives the same text and then ends its turn."""
    return lambda text: TestClient(create_app(start_engine(chain_dir(text))))


def chat(client: TestClient, **fields: Any) -> Any:
    body = {"model": "base", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    return client.post("/v1/chat/completions", json=body | fields)


def error(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = chat(client, **fields)
    assert response.status_code == 400, response.text
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert (found["type"], found["code"]) == ("BadRequestError", 400)
    return found


def test_completion_has_vllms_shape(client: TestClient, reference: Any) -> None:
    body = chat(client, ignore_eos=True, return_token_ids=True).json()
    (choice,) = body["choices"]
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "base")
    assert body["prompt_token_ids"] == reference.prompt("hello")
    assert choice["message"]["role"] == "assistant"
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert choice["logprobs"] is None
    assert len(choice["token_ids"]) == 12
    prompt = len(body["prompt_token_ids"])
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_token_ids_and_logprobs_only_when_asked_for(client: TestClient) -> None:
    body = chat(client).json()
    assert "prompt_token_ids" not in body
    assert "token_ids" not in body["choices"][0]
    assert body["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.3, "seed": 5, "top_p": 0.95}, {"stop": ["e", "\n"]}])
def test_stream_is_the_answer_in_pieces(client: TestClient, read_stream: Any, fields: dict[str, Any]) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "max_tokens": 40, **fields}
    whole = chat(client, **fields).json()
    response = chat(client, **fields, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *middle, usage = read_stream(response.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == first["id"] for chunk in middle)

    choices = [chunk["choices"][0] for chunk in middle]
    wanted = whole["choices"][0]
    assert "".join(choice["delta"]["content"] for choice in choices) == wanted["message"]["content"]
    assert [token for choice in choices for token in choice["token_ids"]] == wanted["token_ids"]
    assert [entry for choice in choices for entry in choice["logprobs"]["content"]] == wanted["logprobs"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == wanted["finish_reason"]
    assert choices[-1]["stop_reason"] == wanted["stop_reason"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_end_of_turn_is_a_token_and_not_text(chain_client: Any) -> None:
    body = chat(chain_client("Yes, 42!"), return_token_ids=True, logprobs=True).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Yes, 42!"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["token_ids"][-1] == END
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == body["usage"]["completion_tokens"]
    assert choice["logprobs"]["content"][-1]["token"] == "<|im_end|>"


def test_ignore_eos_goes_on(chain_client: Any) -> None:
    choice = chat(chain_client("Yes"), ignore_eos=True, return_token_ids=True).json()["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 12)
    assert END in choice["token_ids"]


def test_characters_of_several_tokens_arrive_whole(chain_client: Any, read_stream: Any) -> None:
    response = chat(chain_client("é ✨ok"), stream=True, max_tokens=60)
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in read_stream(response.text)]
    assert "".join(deltas) == "é ✨ok"
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


def test_length_limit_inside_a_character_drops_the_half(chain_client: Any) -> None:
    body = chat(chain_client("a✨"), max_tokens=3, return_token_ids=True).json()
    assert body["choices"][0]["message"]["content"] == "a"
    assert len(body["choices"][0]["token_ids"]) == 3


def test_stop_string_cuts_text_and_keeps_tokens(chain_client: Any) -> None:
    client = chain_client("one,TWO;z")
    choice = chat(client, stop=["TWO", "z"], return_token_ids=True).json()["choices"][0]
    assert choice["message"]["content"] == "one,"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "TWO")
    assert len(choice["token_ids"]) == len("one,TWO")


def test_stop_token_ids_are_named(chain_client: Any) -> None:
    client = chain_client("abc")
    b = chat(client, return_token_ids=True).json()["choices"][0]["token_ids"][1]
    choice = chat(client, stop_token_ids=[b], return_token_ids=True).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", b)


def test_seed_repeats_an_answer(client: TestClient) -> None:
    texts = [chat(client, temperature=1.5, seed=seed).json()["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_ignore_temperature(client: TestClient, reference: Any) -> None:
    body = chat(client, temperature=0.6, top_k=3, seed=3, logprobs=True, return_token_ids=True).json()
    ids = body["choices"][0]["token_ids"]
    expected = reference.logprobs(body["prompt_token_ids"], ids)[range(len(ids)), ids].tolist()
    got = [entry["logprob"] for entry in body["choices"][0]["logprobs"]["content"]]
    assert got == pytest.approx(expected, abs=1e-4)


def test_token_entries_can_name_ids(client: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = chat(client, **fields).json()["choices"][0]
    wanted = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == wanted
    assert [entry["top_logprobs"][0]["token"] for entry in choice["logprobs"]["content"]] == wanted


def test_content_parts_are_joined_by_line_breaks(client: TestClient) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    split = chat(client, messages=[{"role": "user", "content": parts}], return_token_ids=True).json()
    plain = chat(client, messages=[{"role": "user", "content": "hel\nlo"}], return_token_ids=True).json()
    assert split["prompt_token_ids"] == plain["prompt_token_ids"]


def test_each_chunk_has_the_counts_so_far_where_they_are_asked_for(client: TestClient, read_stream: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = read_stream(chat(client, stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (counts[0], counts[-1]) == (0, 12)
    assert counts == sorted(counts)
    chunks = read_stream(chat(client, stream=True, stream_options={"continuous_usage_stats": True}).text)
    assert not any("usage" in chunk for chunk in chunks)


def test_sampling_defaults_come_from_the_model(
    start_engine: Callable[..., Engine], model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in model_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text('{"temperature": 0, "eos_token_id": [2, 77], "max_new_tokens": 9}')
    client = TestClient(create_app(start_engine(path)))
    body = {"model": "base", "messages": HELLO, "return_token_ids": True}
    first, second = (client.post("/v1/chat/completions", json=body).json()["choices"][0] for _ in range(2))
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) <= 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"repetition_detection": {"max_pattern_size": 2, "min_count": 2}}, "repetition_detection"),
        ({"stream_interval": 2}, "stream_interval"),
        ({"include_reasoning": False}, "include_reasoning"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str | None
) -> None:
    found = error(client, **fields)
    assert param is None or found["param"] == param


def test_neutral_and_unknown_fields_are_ignored(client: TestClient) -> None:
    plain = chat(client).json()["choices"][0]
    extra = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "tool_choice": "none", "user": "u",
        "response_format": {"type": "text"}, "logit_bias": None, "priority": 3, "never_heard_of": {"a": 1},
    }  # fmt: skip
    assert chat(client, **extra).json()["choices"][0] == plain


def test_a_huge_prompt_is_refused_before_it_is_tokenised(client: TestClient) -> None:
    """30 MB take the tokenizer a minute, and nobody is served meanwhile: the answer counts characters, not tokens."""
    message = error(client, messages=[{"role": "user", "content": "ab " * 1_000_000}])["message"]
    assert "maximum context length is 512 tokens" in message
    assert "3000000 characters" in message


def test_prompt_too_long_says_both_lengths(client: TestClient) -> None:
    message = error(client, messages=[{"role": "user", "content": "x" * 600}])["message"]
    assert "maximum context length is 512 tokens" in message
    assert "prompt has 6" in message


def test_answer_may_fill_the_context_exactly(client: TestClient, reference: Any) -> None:
    room = 512 - len(reference.prompt("hello"))
    answer = chat(client, max_tokens=room, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 512
    assert error(client, max_tokens=room + 1)["param"] == "max_tokens"


def test_max_completion_tokens_wins(client: TestClient) -> None:
    body = chat(client, max_tokens=9, max_completion_tokens=4, ignore_eos=True).json()
    assert body["usage"]["completion_tokens"] == 4


def test_unknown_model(client: TestClient) -> None:
    response = chat(client, model="nobody")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The model `nobody` does not exist.", "type": "NotFoundError", "param": "model", "code": 404,
    }  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b'{"model": "base"}', b"\xff\xfe"])
def test_bad_bodies(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


def test_template_that_refuses_is_a_bad_request(
    start_engine: Callable[..., Engine], model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in model_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    client = TestClient(create_app(start_engine(path)))
    assert "roles must alternate" in error(client)["message"]


def test_full_queue_is_503(start_engine: Callable[..., Engine], model_dir: Path, submit: Any) -> None:
    engine = start_engine(model_dir, max_num_seqs=1, max_waiting=1)
    submit(engine, max_tokens=4000).next()
    submit(engine)
    response = chat(TestClient(create_app(engine)))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "ServiceUnavailableError"


def test_broken_adapter_is_500_and_an_error_event_in_a_stream(
    client: TestClient, make_adapter: Callable[..., Path], read_stream: Any
) -> None:
    path = make_adapter("huge", size=1e18)
    client.post("/v1/load_lora_adapter", json={"lora_name": "huge", "lora_path": str(path)})
    response = chat(client, model="huge")
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    *_, last = read_stream(chat(client, model="huge", stream=True).text)
    assert last["error"]["code"] == 500
    assert chat(client).status_code == 200


def test_tokenize_counts_what_a_chat_would_have(client: TestClient, reference: Any) -> None:
    answer = client.post("/tokenize", json={"model": "base", "messages": HELLO}).json()
    assert answer["tokens"] == reference.prompt("hello")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    plain = client.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()
    assert plain["tokens"] == reference.tokenizer("hello")["input_ids"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "prompt": "x"}, 404),
        ({"model": "base"}, 400),
        ({"prompt": "x", "messages": HELLO}, 400),
        ({"messages": []}, 400),
    ],
)
def test_tokenize_refuses(client: TestClient, body: dict[str, Any], status: int) -> None:
    response = client.post("/tokenize", json=body)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status
