"""The service over HTTP with two tenants and a worker, on a real database file and a fake engine with behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import text
from starlette.testclient import TestClient

from api_schemas.worker import FileEntry, Lease
from service.context import Context
from service.db.engine import clock
from service.serving.names import served_name
from tests.service import peft_files
from tests.service.fake_engine import FakeEngine

Json = dict[str, Any]
LORA = {"rank": 2, "alpha": 4}


@dataclass(frozen=True)
class Caller:
    """One key's view of the API."""

    client: TestClient
    key: str

    def request(self, method: str, path: str, **kwargs: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.key}", **kwargs.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx2.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx2.Response:
        return self.request("POST", path, json=body, **kwargs)

    def ok(self, method: str, path: str, body: Any = None, **kwargs: Any) -> Json:
        """The body of an answer that must be a success."""
        answer = self.request(method, path, json=body, **kwargs)
        assert answer.is_success, (answer.status_code, answer.text)
        return dict(answer.json())

    def create(self, name: str = "helper", **fields: Any) -> Json:
        return self.ok("POST", "/v1/adapters", {"name": name, "lora": LORA} | fields)

    def chat(self, model: str = "helper", content: str = "who are you", **fields: Any) -> Json:
        body = {"model": model, "messages": [{"role": "user", "content": content}]} | fields
        return self.ok("POST", "/v1/chat/completions", body)

    def says(self, model: str) -> str:
        """The text of an answer, which names the model that gave it."""
        return str(self.chat(model)["choices"][0]["message"]["content"])

    def feedback(
        self, remark: str = "shorter", *, key: str | None = None, adapter: str = "helper", **fields: Any
    ) -> Json:
        """A batch of one remark on text from elsewhere, accepted."""
        headers = {"idempotency-key": key} if key else {}
        return self.ok("POST", "/v1/feedback", batch(remark, adapter=adapter) | fields, headers=headers)

    def job(self, job_id: str) -> Json:
        return self.ok("GET", f"/v1/jobs/{job_id}")

    def adapter(self, name: str = "helper") -> Json:
        return self.ok("GET", f"/v1/adapters/{name}")


def batch(*remarks: str, adapter: str | None = "helper") -> Json:
    """A feedback body about text that did not come through the gateway."""
    messages = [{"role": "user", "content": "name a fruit"}]
    items = [{"messages": messages, "response": "a pear", "feedback": r} for r in remarks]
    return {"items": items} | ({"adapter": adapter} if adapter else {})


@dataclass(frozen=True)
class Worker:
    """A worker that leases over HTTP and writes version directories; its training is instant."""

    caller: Caller
    root: Path
    name: str = "worker-1"

    def lease(self, base: str = peft_files.BASE, **fields: Any) -> Lease | None:
        answer = self.caller.post("/worker/v1/leases", {"worker_id": self.name, "base_model": base} | fields)
        assert answer.status_code in (200, 204), answer.text
        return None if answer.status_code == 204 else Lease.model_validate_json(answer.content)

    def must_lease(self) -> Lease:
        lease = self.lease()
        assert lease is not None
        return lease

    def call(self, lease: Lease, verb: str, **fields: Any) -> httpx2.Response:
        return self.caller.post(f"/worker/v1/runs/{lease.run_id}/{verb}", {"token": lease.token} | fields)

    def send(self, lease: Lease, file: FileEntry, body: bytes | None = None) -> httpx2.Response:
        """One file of the version, as workers do that share no directory with the service."""
        path = self.root / lease.adapter_id / lease.run_id / file.name
        return self.caller.request(
            "PUT",
            f"/worker/v1/runs/{lease.run_id}/files/{file.sha256}",
            params={"token": lease.token},
            content=path.read_bytes() if body is None else body,
        )

    def commit(self, lease: Lease, files: list[FileEntry], **fields: Any) -> httpx2.Response:
        body = {
            "uri": f"{lease.adapter_id}/{lease.run_id}",
            "files": [f.model_dump() for f in files],
            "standing_feedback": [*lease.standing_feedback, *(i.feedback for i in lease.items if i.standing)],
            "metrics": [{"step": 1, "loss": 0.5, "gap": 0.2}],
            "training_seconds": 1.5,
        }
        return self.call(lease, "commit", **(body | fields))

    def train(self, lease: Lease | None = None) -> int:
        """Lease (unless given), write, commit; the number of the version."""
        lease = lease or self.must_lease()
        files = peft_files.manifest(peft_files.write_version(self.root, lease))
        for file in files if lease.files == "http" else []:
            sent = self.send(lease, file)
            assert sent.status_code == 200, sent.text
        answer = self.commit(lease, files)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["version"])

    def fail(self, lease: Lease, *, retryable: bool = True, code: str = "out_of_memory") -> httpx2.Response:
        return self.call(lease, "fail", error={"code": code, "message": "no"}, retryable=retryable)


@dataclass(frozen=True)
class Stack:
    """Everything that a test of the service may look at."""

    context: Context
    engine: FakeEngine
    client: TestClient
    alice: Caller
    bob: Caller
    worker: Worker

    @property
    def root(self) -> Path:
        return self.context.settings.adapters_root

    def served(self, n: int, adapter: str = "helper") -> str:
        """The engine's name of a version of alice's."""
        return served_name(self.alice.adapter(adapter)["id"], n)

    def converge(self) -> None:
        """One whole pass of the publisher, on the service's event loop."""
        assert self.client.portal is not None
        self.client.portal.call(self.context.publisher.converge)

    def learn(self, remark: str = "shorter", adapter: str = "helper") -> int:
        """Feedback, training, publication; the number of the version that is served then."""
        self.alice.feedback(remark, adapter=adapter)
        n = self.worker.train()
        self.converge()
        return n

    def sql(self, statement: str, **values: Any) -> None:
        """Change the database behind the service's back."""
        with self.context.database.write() as s:
            s.execute(text(statement), values)

    def now(self) -> float:
        """By the database's clock, Unix seconds."""
        with self.context.database.read() as s:
            return clock(s)

    def rows(self, statement: str, **values: Any) -> list[Mapping[str, Any]]:
        with self.context.database.read() as s:
            return [dict(r) for r in s.execute(text(statement), values).mappings()]

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"])  # noqa: S608 - names from tests


def error_of(answer: httpx2.Response, status: int, code: str) -> Json:
    """The error of an answer that must be refused so, in the one shape of all errors."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"code", "message", "type", "param"}
    assert body["error"]["code"] == code, body
    assert "Traceback" not in answer.text
    return dict(body["error"])
