"""The engine's numbers against bare Transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient


def load(client: TestClient, name: str, path: Path) -> None:
    response = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
    assert response.status_code == 200, response.text


def test_greedy_base_is_transformers_generate(client: TestClient, ask: Any, reference: Any) -> None:
    answer = ask(client, "what is it?", max_tokens=40)
    assert answer["choices"][0]["token_ids"] == reference.greedy("what is it?", 40)
    assert answer["prompt_token_ids"] == reference.prompt("what is it?")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
)
def test_adapter_is_what_peft_computes(
    client: TestClient, ask: Any, reference: Any, make_adapter: Callable[..., Path], options: dict[str, Any]
) -> None:
    path = make_adapter("v1", **options)
    load(client, "v1", path)
    answer = ask(client, "go on", model="v1", max_tokens=30, top_logprobs=5)
    choice = answer["choices"][0]
    assert choice["token_ids"] == reference.greedy("go on", 30, path)
    assert choice["token_ids"] != reference.greedy("go on", 30)

    expected = reference.logprobs(answer["prompt_token_ids"], choice["token_ids"], path)
    for row, entry in zip(expected, choice["logprobs"]["content"], strict=True):
        best = row.topk(5).values.tolist()
        assert entry["logprob"] == pytest.approx(best[0], abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best, abs=1e-4)
