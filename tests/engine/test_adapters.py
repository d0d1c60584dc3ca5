"""Loading and unloading: what vLLM refuses is refused with its status, and what vLLM lets through wrongly as well."""

import json
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from worker.engine.engine import Engine
from worker.engine.errors import BadRequestError
from worker.engine.lora import LoraWeights
from worker.engine.registry import AdapterRegistry

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def load(client: TestClient, name: str, path: Path | str) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def unload(client: TestClient, name: str) -> Any:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def change_config(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    # Read as bytes: a file must not be written while it is mapped.
    tensors = {key: tensor.clone() for key, tensor in load_file(path / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def test_loaded_adapters_are_listed_as_vllm_lists_them(
    client: TestClient, make_adapter: Callable[..., Path], model_dir: Path
) -> None:
    path = make_adapter("v1")
    response = load(client, "v1", path)
    assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, "text/plain")
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    shown = [{key: card[key] for key in ("id", "root", "parent", "max_model_len")} for card in listed["data"]]
    assert shown == [
        {"id": "base", "root": str(model_dir), "parent": None, "max_model_len": 512},
        {"id": "v1", "root": str(path), "parent": "base", "max_model_len": 512},
    ]
    assert unload(client, "v1").status_code == 200
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base"]


def test_name_taken(client: TestClient, make_adapter: Callable[..., Path]) -> None:
    path = make_adapter("v1")
    assert load(client, "v1", path).status_code == 200
    for name in ("v1", "base"):
        response = load(client, name, path)
        assert response.status_code == 400
        assert "already been loaded" in response.json()["error"]["message"]


def test_unknown_name_cannot_be_unloaded(client: TestClient) -> None:
    response = unload(client, "nobody")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_missing_path_or_config(client: TestClient, make_adapter: Callable[..., Path], adapters_root: Path) -> None:
    assert load(client, "v1", adapters_root / "nothing").status_code == 404
    path = make_adapter("v1")
    (path / "adapter_config.json").unlink()
    assert load(client, "v1", path).status_code == 404


def test_paths_outside_the_root_are_refused(
    client: TestClient, make_adapter: Callable[..., Path], adapters_root: Path, tmp_path: Path
) -> None:
    path = make_adapter("v1")
    outside = path.rename(tmp_path / "outside")
    (adapters_root / "link").symlink_to(outside)
    for tried in (outside, adapters_root / "link", adapters_root / ".." / "outside", "/etc"):
        response = load(client, "v1", tried)
        assert response.status_code == 403, tried
        assert str(outside) not in response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"peft_type": "IA3"},
        {"rank_pattern": {"(a+)+": 4}},
        {"r": 3},
        {"lora_alpha": "much"},
    ],
)
def test_configurations_that_would_be_served_wrongly(
    client: TestClient, make_adapter: Callable[..., Path], fields: dict[str, Any]
) -> None:
    path = make_adapter("v1")
    change_config(path, **fields)
    response = load(client, "v1", path)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"


def test_rank_above_the_maximum(client: TestClient, make_adapter: Callable[..., Path]) -> None:
    response = load(client, "v1", make_adapter("v1", r=4, rank_pattern={"q_proj": 9}))
    assert response.status_code == 500
    assert "greater than max_lora_rank 8" in response.json()["error"]["message"]
    assert load(client, "v2", make_adapter("v2", r=8)).status_code == 200


def _drop_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def _foreign_layer(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        tensors[f"{Q}.lora_{side}.weight".replace("layers.0", "layers.7")] = tensors[f"{Q}.lora_{side}.weight"].clone()


def _wrong_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 49)


def _vector(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(48)


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"][0, 0] = torch.nan


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"][1, 1] = -torch.inf


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 48, dtype=torch.int8)


def _extra_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def _nothing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    "change",
    [
        _drop_b, _foreign_layer, _wrong_width, _vector, _not_a_number, _infinite, _integers, _extra_tensor, _nothing,
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(
    client: TestClient, make_adapter: Callable[..., Path], change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    path = make_adapter("v1")
    change_weights(path, change)
    assert load(client, "v1", path).status_code == 500
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base"]


@pytest.mark.parametrize("size", [0, 5, 100, 3000])
def test_truncated_weights(client: TestClient, make_adapter: Callable[..., Path], size: int) -> None:
    path = make_adapter("v1")
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:size])
    assert load(client, "v1", path).status_code == 500


def test_pickled_weights_are_never_read(client: TestClient, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "went-off",)

    path = make_adapter("v1")
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert load(client, "v1", path).status_code == 500
    assert not (tmp_path / "went-off").exists()


def test_failed_load_leaves_the_name_free(client: TestClient, make_adapter: Callable[..., Path]) -> None:
    path = make_adapter("v1")
    config = (path / "adapter_config.json").read_text()
    change_config(path, use_dora=True)
    assert load(client, "v1", path).status_code == 500
    (path / "adapter_config.json").write_text(config)
    assert load(client, "v1", path).status_code == 200


def test_directory_may_be_changed_or_deleted_after_loading(
    engine: Engine, submit: Any, reference: Any, make_adapter: Callable[..., Path]
) -> None:
    path = make_adapter("v1")
    expected = reference.greedy("stay", 20, path)
    engine.load_adapter("v1", str(path))
    (path / WEIGHTS).write_bytes(b"\0" * 10)
    (path / WEIGHTS).unlink()
    assert submit(engine, "stay", model="v1").tokens() == expected


def test_loading_does_not_disturb_running_requests(
    engine: Engine, submit: Any, reference: Any, make_adapter: Callable[..., Path]
) -> None:
    paths = [make_adapter(f"v{seed}", seed=seed) for seed in range(4)]
    running = submit(engine, "undisturbed", max_tokens=300)
    begun = [running.next().token_id]
    loaders = [threading.Thread(target=engine.load_adapter, args=(path.name, str(path))) for path in paths]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
    assert begun + running.tokens() == reference.greedy("undisturbed", 300)
    assert len(engine.models()) == 5


def test_two_calls_for_one_name_load_it_once(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    reads: list[Path] = []

    def read(path: Path) -> LoraWeights:
        reads.append(path)
        begun.set()
        assert go_on.wait(30)
        return LoraWeights({})

    registry = AdapterRegistry(tmp_path, read, reserved="base")
    (tmp_path / "a").mkdir()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(registry.load, "v1", str(tmp_path / "a"), 0)
        assert begun.wait(30)
        second = pool.submit(registry.load, "v1", str(tmp_path / "a"), 0)
        assert registry.get("v1") is None  # requests are not held up meanwhile
        go_on.set()
        first.result(30)
        with pytest.raises(BadRequestError, match="already been loaded"):
            second.result(30)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "body", [{}, {"lora_name": "v1"}, {"lora_name": "", "lora_path": "/x"}, {"lora_name": 3, "lora_path": []}]
)
def test_bad_load_bodies(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


def test_in_place_loading_is_refused(client: TestClient, make_adapter: Callable[..., Path]) -> None:
    body = {"lora_name": "v1", "lora_path": str(make_adapter("v1")), "load_inplace": True}
    response = client.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "load_inplace")
