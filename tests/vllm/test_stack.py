"""The whole loop with a real vLLM as the engine: nothing but the URL differs from the embedded one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest

from demo.run import score
from demo.tasks import heldout_tasks
from service.db.engine import Database
from service.db.tables import Rollout
from tests.e2e.conftest import Running
from tests.vllm.server import VllmServer
from tests.vllm.waits import ours

HELDOUT = heldout_tasks(40)
QUESTION = [{"role": "user", "content": "capital of peru?"}]
BATCHES = 4


@dataclass(frozen=True)
class Lesson:
    """What the one adapter of this file was before and after it was taught."""

    before: float
    after: float
    """Share of held-out answers that comply, 0 to 1."""


@pytest.fixture(scope="module")
def lesson(vllm_running: Running) -> Lesson:
    running = vllm_running
    running.create("pupil")
    before = complying(running, "pupil")
    for seed in range(BATCHES):
        job = running.learn("pupil", "hope", seed=seed)
        assert job["version"] == seed + 1
        # Behaviour log-probs came from vLLM, the worker's from Transformers: the ratio of the first step compares them.
        assert job["metrics"][0]["mean_is_ratio"] == pytest.approx(1.0, abs=1e-3)
    return Lesson(before, complying(running, "pupil"))


def complying(running: Running, model: str) -> float:
    replies = running.client.chat_all(model, [t.prompt for t in HELDOUT], temperature=0.0, store=False)
    return score(HELDOUT, [r.text for r in replies], ("hope",)).complies["hope"]


@pytest.fixture
def client(vllm_running: Running) -> Iterator[openai.OpenAI]:
    stack = vllm_running.stack
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_key, max_retries=0) as made:
        yield made


def direct(vllm: VllmServer, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """vLLM's own greedy answer, asked without us."""
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": 48,
        "logprobs": True,
        "return_token_ids": True,
    }
    answer = httpx2.post(f"{vllm.url}/v1/chat/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def loaded(vllm: VllmServer, running: Running, n: int) -> tuple[str, str]:
    """Name and directory of this service's only adapter in version `n`, as vLLM lists it."""
    (name,) = (name for name in ours(vllm, running.stack) if name.endswith(f"-v{n}"))
    return name, vllm.models()[name]


def test_the_server_is_several_processes_that_are_measured_together(vllm: VllmServer) -> None:
    assert len(vllm.pids()) >= 2
    assert vllm.resident_bytes() > 2**30


def test_vllm_serves_what_was_taught(lesson: Lesson) -> None:
    assert lesson.before == 0.0
    assert lesson.after >= 0.8


def test_rollouts_hold_vllms_own_tokens_and_log_probs(vllm: VllmServer, vllm_running: Running, lesson: Lesson) -> None:
    reply = vllm_running.client.chat("pupil", QUESTION[0]["content"], temperature=0)
    served, _ = loaded(vllm, vllm_running, BATCHES)
    own = direct(vllm, served, QUESTION)
    database = Database(f"sqlite:///{vllm_running.stack.data / 'perennial.db'}")
    try:
        with database.read() as s:
            kept = s.get_one(Rollout, reply.id)
            choice = own["choices"][0]
            assert kept.response == choice["message"]["content"] == reply.text
            assert kept.prompt_token_ids == own["prompt_token_ids"]
            assert kept.response_token_ids == choice["token_ids"]
            own_logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert kept.logprobs == pytest.approx(own_logprobs, abs=1e-6)
    finally:
        database.close()


def test_the_openai_client_streams(client: openai.OpenAI, lesson: Lesson) -> None:
    whole = client.chat.completions.create(model="pupil", messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model="pupil",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert {c.model for c in chunks} == {f"pupil@v{BATCHES}"}


def test_an_old_version_is_served_beside_the_live_one_and_promoted_back(vllm_running: Running, lesson: Lesson) -> None:
    call, chat = vllm_running.client.call, vllm_running.client.chat
    prompts = [t.prompt for t in HELDOUT[:8]]
    at_one = [chat("pupil@v1", p, temperature=0).text for p in prompts]
    assert at_one != [chat("pupil", p, temperature=0).text for p in prompts]
    try:
        call("POST", "/v1/adapters/pupil/promote", json={"version": 1})
        answers = [chat("pupil", p, temperature=0) for p in prompts]
        assert {a.model for a in answers} == {"pupil@v1"}
        assert [a.text for a in answers] == at_one
    finally:
        call("POST", "/v1/adapters/pupil/promote", json={"version": BATCHES})


def test_a_version_is_downloaded_as_vllm_loaded_it(vllm: VllmServer, vllm_running: Running, lesson: Lesson) -> None:
    url = f"{vllm_running.stack.url}/v1/adapters/pupil/versions/{BATCHES}/download"
    answer = httpx2.get(url, headers={"authorization": f"Bearer {vllm_running.stack.api_key}"})
    assert answer.status_code == 200
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    vllm_running.client.chat("pupil", "hi")  # served, hence loaded
    _, directory = loaded(vllm, vllm_running, BATCHES)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open(f"{directory}/{name}", "rb") as file:
            assert archive.read(name) == file.read()
