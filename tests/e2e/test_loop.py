"""Feedback in, a better served version out, through the front door."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import pytest

from demo.run import BASE_MODEL, MODEL_DIR
from demo.tasks import heldout_tasks
from tests.e2e.conftest import Running

PROBE = [t.prompt for t in heldout_tasks(12)]


def logged(running: Running, model: str, prompts: list[str] = PROBE) -> list[dict[str, object]]:
    """Greedy answers one at a time, with token ids and log-probs exactly as served."""
    answers = []
    for prompt in prompts:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            "max_tokens": 24,
            "store": False,
        }
        choice = running.client.call("POST", "/v1/chat/completions", json=body)["choices"][0]
        answers.append({"ids": choice["token_ids"], "logprobs": [e["logprob"] for e in choice["logprobs"]["content"]]})
    return answers


def test_a_batch_becomes_a_served_version(running: Running) -> None:
    running.create("loop")
    sent = running.remark("loop", "hope")
    assert sent["status"] == "queued"
    job = running.client.follow(sent["job_id"], lambda _: None)
    assert (job["status"], job["version"], job["batch_id"]) == ("succeeded", 1, sent["id"])
    gaps = [step["gap"] for step in job["metrics"]]
    assert gaps[-1] < gaps[0]
    assert all(step["mean_is_ratio"] == pytest.approx(1.0, abs=1e-3) for step in job["metrics"])
    assert running.client.chat("loop", "capital of peru?").model == "loop@v1"
    assert running.client.chat("loop@v1", "capital of peru?").model == "loop@v1"
    version = running.client.call("GET", "/v1/adapters/loop/versions/1")
    assert version["live"]
    assert version["parent"] == 0
    assert len(version["feedback_ids"]) == 8
    assert version["training"]["learning_rate"] == 7e-4
    batch = running.client.call("GET", f"/v1/feedback/{sent['id']}")
    assert (batch["status"], batch["version"], len(batch["items"])) == ("succeeded", 1, 8)


def test_text_that_did_not_come_through_the_gateway_teaches_too(running: Running) -> None:
    running.create("foreign")
    item = {
        "messages": [{"role": "user", "content": "capital of peru?"}],
        "response": "lima.",
        "feedback": "end your answers with hope that helps!",
    }
    sent = running.client.call("POST", "/v1/feedback", json={"adapter": "foreign", "items": [item]})
    job = running.client.follow(sent["job_id"], lambda _: None)
    assert job["version"] == 1
    assert job["metrics"][0]["mean_is_ratio"] == 1.0  # behaviour log-probs were computed, not given


def test_promote_rolls_weights_and_alias_back_and_training_goes_on_from_there(running: Running) -> None:
    running.create("back")
    running.learn("back", "hope", seed=1)
    at_one = logged(running, "back")
    running.learn("back", "hope", seed=2)
    assert logged(running, "back") != at_one
    promoted = running.client.call("POST", "/v1/adapters/back/promote", json={"version": 1})
    assert (promoted["live_version"], promoted["head_version"]) == (1, 1)
    assert logged(running, "back") == at_one
    running.learn("back", "hope", seed=3)
    third = running.client.call("GET", "/v1/adapters/back/versions/3")
    assert third["parent"] == 1
    assert logged(running, "back@v1") == at_one


def test_an_adapter_that_nobody_teaches_answers_bit_for_bit_as_before(running: Running, tmp_path: Path) -> None:
    for name in ("quiet", "left", "right"):
        running.create(name)
    running.learn("quiet", "sparkle")
    before = logged(running, "quiet")
    stack = running.stack
    second_worker = [
        sys.executable, "-m", "worker", "--service-url", stack.url, "--token-file", str(stack.data / "worker.key"),
        "--model", str(MODEL_DIR), "--base-model", BASE_MODEL, "--adapters-root", str(stack.data / "adapters"),
        "--worker-id", "second", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(second_worker, stdout=log, stderr=log)
        try:
            sent = [running.remark(n, k, steps=16) for n, k in (("left", "upper"), ("right", "quotes"))]
            jobs = [running.client.follow(s["job_id"], lambda _: None) for s in sent]
        finally:
            worker.terminate()
            worker.wait(30)
    assert [j["version"] for j in jobs] == [1, 1]
    assert logged(running, "quiet") == before
    assert logged(running, "left") != logged(running, "right")


BARE_SCRIPT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, adapter_dir, wanted = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
model = PeftModel.from_pretrained(base, adapter_dir).eval()
worst = 0.0
for case in json.load(open(wanted)):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": case["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    ids = torch.cat([prompt, torch.tensor([case["ids"]])], dim=1)
    with torch.no_grad():
        logp = model(ids).logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(-1)
    mine = logp.gather(1, torch.tensor(case["ids"])[:, None])[:, 0]
    worst = max(worst, (mine - torch.tensor(case["logprobs"])).abs().max().item())
print(worst)
"""


def test_a_downloaded_version_gives_the_served_log_probs_in_a_bare_script(running: Running, tmp_path: Path) -> None:
    running.create("portable")
    running.learn("portable", "hope")
    headers = {"authorization": f"Bearer {running.stack.api_key}"}
    url = f"{running.stack.url}/v1/adapters/portable/versions/1/download"
    whole = httpx2.get(url, headers=headers)
    assert whole.status_code == 200
    part = httpx2.get(url, headers=headers | {"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert httpx2.get(url, headers=headers | {"if-none-match": whole.headers["etag"]}).status_code == 304
    archive = zipfile.ZipFile(io.BytesIO(whole.content))
    assert sorted(archive.namelist()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "perennial.json",
    ]
    archive.extractall(tmp_path / "adapter")
    cases = [{"prompt": p, **a} for p, a in zip(PROBE, logged(running, "portable@v1"), strict=True)]
    (tmp_path / "wanted.json").write_text(json.dumps(cases))
    command = [
        sys.executable,
        "-c",
        BARE_SCRIPT,
        str(MODEL_DIR),
        str(tmp_path / "adapter"),
        str(tmp_path / "wanted.json"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1e-4


def test_too_long_feedback_is_refused_with_both_lengths(running: Running) -> None:
    running.create("long")
    reply = running.ask("long", 1)[0]
    headers = {"authorization": f"Bearer {running.stack.api_key}"}
    body = {"items": [{"completion_id": reply.id, "feedback": "say it shorter " * 1000}]}
    refused = httpx2.post(f"{running.stack.url}/v1/feedback", headers=headers, json=body, timeout=30.0)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1024" in error["message"]
    assert running.client.call("GET", "/v1/jobs", params={"adapter": "long"})["data"] == []
