"""Scoring a given text, and the one-token probe: vLLM's /v1/completions as far as it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient


def score(client: TestClient, model: str, ids: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0} | fields
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def values(choice: dict[str, Any], ids: list[int]) -> torch.Tensor:
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    return torch.tensor([row[str(token)]["logprob"] for token, row in zip(ids[1:], rest, strict=True)])


def test_a_clients_text_completion_is_refused_by_name(client: TestClient) -> None:
    body = {"model": "base", "prompt": "a", "temperature": 0, "return_token_ids": True, "stop": "x"}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "does not support text completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_texts_log_probs_are_transformers_own(
    client: TestClient, reference: Any, make_adapter: Callable[..., Path], adapted: bool
) -> None:
    path = make_adapter("one") if adapted else None
    model = "one" if adapted else "base"
    if path is not None:
        client.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": str(path)})
    # End tokens inside the text end nothing.
    ids = reference.prompt("how many gulls?") + reference.greedy("how many gulls?", 6) + reference.prompt("and boats?")
    wanted = reference.logprobs(ids[:1], ids[1:], path).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    choice = score(client, model, ids)
    assert (values(choice, ids) - wanted).abs().max() < 1e-4
    assert choice["finish_reason"] == "length"


def test_scoring_beside_other_requests_changes_neither(client: TestClient, reference: Any, ask: Any) -> None:
    ids = reference.prompt("some text to score")
    alone = values(score(client, "base", ids), ids)
    answer = ask(client, "hello")
    for _ in range(3):
        assert torch.equal(values(score(client, "base", ids), ids), alone)
        assert ask(client, "hello")["choices"] == answer["choices"]


def test_a_probe_is_one_greedy_token(client: TestClient, reference: Any) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 1, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 1
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["prompt_logprobs"]) == ("length", None)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "absent"}, 404),
        ({"prompt": []}, 400),
        ({"prompt": [10**9]}, 400),
        ({"prompt": [-1]}, 400),
        ({"prompt": [1] * 600}, 400),
        ({"prompt": ""}, 400),
        ({"prompt_logprobs": 5}, 400),
        ({"temperature": 1.0}, 400),
        ({"stream": True}, 400),
    ],
)
def test_what_is_not_served_is_refused(client: TestClient, fields: dict[str, Any], status: int) -> None:
    body = {"model": "base", "prompt": [1, 2], "max_tokens": 1} | fields
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    assert "error" in answer.json()
