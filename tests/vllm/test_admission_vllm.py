"""Bad uploads in front of a real vLLM: refused with a reason, and the engine's other tenants answer as before.

And the canary, end to end: a real worker's record against vLLM's own log-probs.
"""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import sqlite3
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine_client import EngineClient
from service.local import LocalStack
from tests.service.peft_files import encode, with_header
from tests.vllm.front import Front
from tests.vllm.server import VllmServer
from tests.vllm.tenant import BASE, Answer, Tenant, arrays, config, long_prompt, streaming, weights
from tests.vllm.waits import ours, records, scored, wait_live, write_figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Serve = Callable[..., tuple[LocalStack, Tenant]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def changed(**tensors: np.ndarray) -> bytes:
    return encode(arrays(7) | tensors)


def bad_weights() -> dict[str, tuple[bytes, str]]:
    good = arrays(7)
    key = next(iter(good))
    poisoned = good[key].copy()
    poisoned.flat[-1] = np.nan
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(WEIGHTS, weights(7))
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(WEIGHTS))
    wrong_base = {k.replace("layers.0", "layers.40"): v for k, v in good.items()}
    return {
        "NaN weights": (changed(**{key: poisoned}), "not_finite"),
        "huge weights": (encode({k: v * 1e12 for k, v in good.items()}), "too_large"),
        "wrong base": (encode(wrong_base), "missing_keys"),
        "extra keys": (changed(**{key.replace("layers.0", "layers.9"): good[key]}), "extra_keys"),
        "too high a rank": (encode(arrays(7, rank=32)), "wrong_shape"),
        "DoRA": (changed(**{key.replace("lora_A.weight", "lora_magnitude_vector"): good[key][0]}), "extra_keys"),
        "truncated": (weights(7)[:-100], "bad_file"),
        "header bomb": ((2**62).to_bytes(8, "little") + b"{" * 4096, "bad_file"),
        "deep header": (with_header(b"[" * 500_000), "bad_file"),
        "pickle": (pickle.dumps({"a": list(range(999))}), "pickle"),
        "zip": (zipped.getvalue(), "archive"),
        "tar": (tarred.getvalue(), "archive"),
    }


BAD_CONFIGS = {
    "auto_map": (config(auto_map={"AutoModel": "evil.Model"}), "unsupported: auto_map"),
    "another base": (config(base_model_name_or_path="other/base"), "wrong_base"),
    "too high a rank": (config(r=64), "wrong_rank"),
    "DoRA": (config(use_dora=True), "unsupported: use_dora"),
}
NAMES = ["../h", "a/b", "..", "ü", "名前"]


def test_bad_uploads_are_refused_and_others_answer_as_before(vllm: VllmServer, serve: Serve) -> None:
    stack, tenant = serve()
    for name, seed in (("victim", 1), ("target", 2)):
        tenant.create(name)
        wait_live(tenant, name, tenant.upload(name, weights(seed)))
    prompts = [long_prompt(i, words=40) for i in range(3)]
    before = answers(tenant, prompts)
    state = tenant.ok("GET", "/v1/adapters/target")
    cases = [(WEIGHTS, *case) for case in bad_weights().values()] + [(CONFIG, *case) for case in BAD_CONFIGS.values()]
    for file, body, reason in cases:
        answer = tenant.send("PUT", f"/v1/adapters/target/upload/{file}", content=body)
        assert answer.status_code == 422, (reason, answer.text)
        error = answer.json()["error"]
        assert error["code"] == "version_rejected"
        assert error["message"].startswith(reason), error["message"]
    for name in NAMES:
        answer = tenant.send("POST", "/v1/adapters", json={"name": name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_parameter")
        answer = tenant.send("PUT", f"/v1/adapters/target/upload/{name}", content=weights(7))
        assert answer.status_code in (404, 405, 422)
    assert tenant.ok("GET", "/v1/adapters/target") == state
    assert answers(tenant, prompts) == before
    assert len(ours(vllm, stack)) >= 2
    assert list((stack.data / "adapters").glob("adp_*/.uploads/*")) == []


def answers(tenant: Tenant, prompts: list[str]) -> list[tuple[list[int], str]]:
    asked: list[Answer] = [tenant.ask(m, p, 16) for m in ("victim", "target", "perennial-demo") for p in prompts]
    assert all(not a.error for a in asked)
    return [(a.token_ids, a.text) for a in asked]


def test_the_canary_holds_vllm_to_what_the_trainer_computed(vllm: VllmServer, serve: Serve) -> None:
    stack, tenant = serve("worker")
    body = {"name": "h", "lora": {"rank": 8, "alpha": 16}, "training": {"learning_rate": 2e-3}}
    tenant.ok("POST", "/v1/adapters", json=body)
    with streaming(tenant, "h") as meanwhile:
        job = learn(tenant, "end with: hope that helps!")
    assert [a.error for a in meanwhile if a.error] == []
    assert job["published"] is True, job
    (record,) = records(stack)
    measured = scored(vllm, ours(vllm, stack)[0], record["token_ids"])
    off = max(abs(a - b) for a, b in zip(measured, record["logprobs"], strict=True))
    moved = max(abs(a - b) for a, b in zip(record["parent_logprobs"], record["logprobs"], strict=True))
    write_figures("canary", {"tokens": len(measured), "engine_vs_trainer": off, "version_vs_parent": moved})
    assert off < 1e-4
    assert moved > 1e-2

    # The same weights under a record that says otherwise: withdrawn, with figures, and the alias stays.
    with sqlite3.connect(stack.data / "perennial.db", timeout=30) as rows:
        wrong = json.dumps(record | {"logprobs": [v - 0.001 for v in record["logprobs"]]})
        rows.execute("UPDATE versions SET canary = ? WHERE n = 1", (wrong,))
    tenant.ok("POST", "/v1/adapters/h/promote", json={"version": 0})
    until = time.monotonic() + 120
    while ours(vllm, stack):
        assert time.monotonic() < until, "version 1 is not wanted any more"
        time.sleep(0.2)
    answer = tenant.send("POST", "/v1/adapters/h/promote", json={"version": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "canary_failed"), answer.text
    assert "0.001" in answer.json()["error"]["message"]
    assert tenant.live("h") == 0
    assert ours(vllm, stack) == []


def test_tokens_are_scored_while_others_are_answered(
    vllm: VllmServer, second_vllm: VllmServer, make_front: Callable[[str], Front], tmp_path: Path
) -> None:
    """By raw and by processed values; log-probs of a prompt would end the engine meanwhile."""
    (tmp_path / CONFIG).write_bytes(config())
    (tmp_path / WEIGHTS).write_bytes(weights(3))
    for server in (vllm, second_vllm):
        stack = make_front(server.url).stack
        with closing(Tenant(stack.url, stack.api_key)) as tenant:
            alone, beside = asyncio.run(scores(server, tenant, tmp_path))
        assert beside == pytest.approx(alone, abs=1e-4)
        assert min(alone) < -3, "unlikely tokens are among them"


async def scores(server: VllmServer, tenant: Tenant, adapter: Path) -> tuple[list[float], list[float]]:
    """Of the same tokens: as the prompt of the only request, and one by one beside those of the tenant's clients."""
    name, ids = f"scored-{adapter.name}", [1, *range(100, 140)]
    async with EngineClient(server.url) as engine:
        await engine.load(name, str(adapter))
        alone = await engine.score_prompt(name, ids)
        with streaming(tenant, BASE):
            beside = await engine.score(name, ids)
        await engine.unload(name)
        return alone, beside


def learn(tenant: Tenant, remark: str) -> dict[str, Any]:
    asked = tenant.ok(
        "POST",
        "/v1/chat/completions",
        json={"model": "h", "messages": [{"role": "user", "content": "capital of peru?"}]},
    )
    item = {"completion_id": asked["id"], "feedback": remark}
    job = tenant.ok("POST", "/v1/feedback", json={"items": [item]})["job_id"]
    until = time.monotonic() + 120
    while time.monotonic() < until:
        view = tenant.ok("GET", f"/v1/jobs/{job}")
        if view["published"] or view["status"] in ("failed", "cancelled"):
            return view
        time.sleep(0.1)
    raise TimeoutError(job)
