"""The real stack: service, worker and embedded engine as processes, the shipped model, HTTP from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.client import Client, Json, Reply
from demo.run import BASE_MODEL, MODEL_DIR
from demo.tasks import PREFERENCES, training_tasks
from service.local import LocalConfig, LocalStack

LORA = {"rank": 8, "alpha": 16}
TRAINING = {"learning_rate": 7e-4}


@dataclass(frozen=True)
class Running:
    stack: LocalStack
    client: Client

    def create(self, name: str, **training: object) -> Json:
        body = {"name": name, "lora": LORA, "training": TRAINING | training}
        return self.client.call("POST", "/v1/adapters", json=body)

    def ask(self, name: str, n: int, seed: int = 0) -> list[Reply]:
        """`n` sampled answers to training prompts, kept as rollouts."""
        return self.client.chat_all(name, [t.prompt for t in training_tasks(seed, n)], temperature=1.0)

    def remark(self, name: str, key: str, n: int = 8, seed: int = 0, **training: object) -> Json:
        """Ask, then send the preference's remarks on the answers; returns the batch."""
        remarks = PREFERENCES[key].remarks
        items = [
            {"completion_id": reply.id, "feedback": remarks[i % len(remarks)]}
            for i, reply in enumerate(self.ask(name, n, seed))
        ]
        return self.client.send_feedback(items, training)

    def learn(self, name: str, key: str, n: int = 8, seed: int = 0, **training: object) -> Json:
        """One batch, until its version is served; returns the job."""
        return self.client.follow(self.remark(name, key, n, seed, **training)["job_id"], lambda _: None)


def start(data_dir: Path, **settings: str) -> LocalStack:
    config = LocalConfig(data_dir, MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=settings)
    return LocalStack(config)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One stack for all tests that do not kill it; each test makes adapters of its own."""
    with (
        start(tmp_path_factory.mktemp("stack"), PERENNIAL_DRAIN_SECONDS="0.5") as stack,
        Client(stack.url, stack.api_key) as client,
    ):
        yield Running(stack, client)
