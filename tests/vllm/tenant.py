"""One tenant of the service: adapters, versions made by upload, and streamed answers."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from demo.run import BASE_MODEL as BASE
from demo.run import MODEL_DIR as MODEL
from tests.service.peft_files import encode

Json = dict[str, Any]
RANK, ALPHA = 4, 8
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def base_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of the demonstration model's linear layers, by name."""
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {k.removesuffix(".weight"): v["shape"] for k, v in header.items() if k != "__metadata__"}
    return {k: (s[0], s[1]) for k, s in shapes.items() if k.rsplit(".", 1)[-1] in TARGETS}


def arrays(seed: int, size: float = 0.06, rank: int = RANK) -> dict[str, np.ndarray]:
    """Random factors of an adapter: every seed is another version."""
    random = np.random.default_rng(seed)
    made = {}
    for module, (out, into) in base_shapes().items():
        for part, shape in (("A", (rank, into)), ("B", (out, rank))):
            values = size * random.standard_normal(shape)
            made[f"base_model.model.{module}.lora_{part}.weight"] = values.astype(np.float32)
    return made


def weights(seed: int, size: float = 0.06) -> bytes:
    return encode(arrays(seed, size))


def config(**changes: Any) -> bytes:
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "r": RANK, "lora_alpha": ALPHA,
        "target_modules": TARGETS, "bias": "none",
    }  # fmt: skip
    return json.dumps(values | changes).encode()


@dataclass
class Answer:
    """One streamed answer. `error` says how it failed."""

    prompt: str
    model: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    status: int = 0
    retry_after: str | None = None
    error: str = ""

    @property
    def version(self) -> int:
        found = re.fullmatch(r".+@v(\d+)", self.model)
        assert found is not None, self.model
        return int(found[1])


class Tenant:
    """Thread-safe."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120.0)

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **kwargs: Any) -> httpx2.Response:
        return self._http.request(method, path, **kwargs)

    def ok(self, method: str, path: str, **kwargs: Any) -> Json:
        answer = self.send(method, path, **kwargs)
        assert answer.is_success, (path, answer.status_code, answer.text)
        return dict(answer.json())

    def create(self, name: str) -> None:
        lora = {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS}
        self.ok("POST", "/v1/adapters", json={"name": name, "lora": lora})

    def upload(self, name: str, body: bytes, config_body: bytes | None = None) -> int:
        """A new version of these weights; its number. It is served a moment later."""
        config_body = config_body or config()
        url = f"/v1/adapters/{name}/upload"
        self.ok("PUT", f"{url}/adapter_config.json", content=config_body)
        self.ok("PUT", f"{url}/adapter_model.safetensors", content=body)
        named = {"config_sha256": config_body, "weights_sha256": body}
        sums = {k: hashlib.sha256(v).hexdigest() for k, v in named.items()}
        return int(self.ok("POST", f"{url}/commit", json=sums)["version"])

    def live(self, name: str) -> int:
        return int(self.ok("GET", f"/v1/adapters/{name}")["live_version"])

    def ask(self, model: str, prompt: str, tokens: int = 48) -> Answer:
        """One streamed greedy answer with its ids and log-probs. Never raises for what the service answers."""
        body = {
            "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0,
            "stream": True, "logprobs": True, "return_token_ids": True, "store": False,
        }  # fmt: skip
        answer = Answer(prompt)
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                answer.status, answer.retry_after = response.status_code, response.headers.get("retry-after")
                if response.status_code != 200:
                    answer.error = response.read().decode()
                    return answer
                for event in _events(response):
                    _take(answer, event)
        except httpx2.TransportError as error:
            answer.error = repr(error)
        if not answer.error and answer.finish_reason is None:
            answer.error = "ended early"
        return answer


@contextmanager
def streaming(tenant: Tenant, model: str, clients: int = 3) -> Iterator[list[Answer]]:
    """Clients that stream answers without end meanwhile. All are complete when the block has been left."""
    answers: list[Answer] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            answers.append(tenant.ask(model, "capital of peru?", 24))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(client) for _ in range(clients)]
        try:
            yield answers
        finally:
            over.set()
        for done in asking:
            done.result()


def _events(response: httpx2.Response) -> Iterator[Json]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _take(answer: Answer, event: Json) -> None:
    if "error" in event:
        answer.error = json.dumps(event)
        return
    assert answer.model in ("", event["model"]), "an answer named two versions"
    answer.model = event["model"]
    for choice in event["choices"]:
        answer.text += choice["delta"].get("content") or ""
        answer.token_ids += choice.get("token_ids") or []
        answer.logprobs += [e["logprob"] for e in (choice.get("logprobs") or {}).get("content") or []]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


def long_prompt(number: int, words: int = 330) -> str:
    """Own words, longer than two of vLLM's blocks of 128 tokens on a CPU."""
    things = ["gull", "boat", "lamp", "rope", "cloud", "stone", "ladder", "harbour", "letter", "wind"]
    made = [f"{things[(number + i * 7) % len(things)]}" for i in range(words)]
    return f"list {number}: {' '.join(made)}. which comes first?"


def directory(data: Path, adapter_dir: str) -> Path:
    return data / "adapters" / adapter_dir
