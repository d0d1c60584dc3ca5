"""The demonstration's view of the service: what any client would send, over HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

Json = dict[str, Any]


class JobFailed(Exception):
    """A job ended otherwise than well; the message is the service's."""


@dataclass(frozen=True)
class Reply:
    id: str
    model: str
    text: str


class Client:
    """Chats from several threads at once; one connection pool."""

    def __init__(self, url: str, api_key: str, *, concurrency: int = 8) -> None:
        headers = {"authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=120.0)
        self._pool = ThreadPoolExecutor(concurrency)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._http.close()

    def call(self, method: str, path: str, **kwargs: Any) -> Json:
        """One call; an error answer raises with the service's own sentence."""
        response = self._http.request(method, path, **kwargs)
        if response.status_code >= 400:
            raise JobFailed(f"{method} {path}: {response.status_code} {response.text}")
        body: Json = response.json()
        return body

    def chat(self, model: str, prompt: str, **sampling: Any) -> Reply:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 48, **sampling}
        answer = self.call("POST", "/v1/chat/completions", json=body)
        return Reply(answer["id"], answer["model"], answer["choices"][0]["message"]["content"])

    def chat_all(self, model: str, prompts: Sequence[str], **sampling: Any) -> list[Reply]:
        """Every prompt, several at a time, in order."""
        return list(self._pool.map(lambda prompt: self.chat(model, prompt, **sampling), prompts))

    def send_feedback(self, items: Sequence[Json], training: Json | None = None) -> Json:
        """One batch, safe to repeat: the idempotency key makes it count once."""
        body: Json = {"items": list(items)}
        if training:
            body["training"] = training
        return self.call("POST", "/v1/feedback", json=body, headers={"idempotency-key": str(uuid.uuid4())})

    def follow(self, job_id: str, on_step: Callable[[Json], None], *, timeout: float = 300.0) -> Json:
        """Watch a job until its version is served; each training step is shown once. Raises JobFailed."""
        until, shown = time.monotonic() + timeout, 0
        while time.monotonic() < until:
            job = self.call("GET", f"/v1/jobs/{job_id}")
            for step in job["metrics"][shown:]:
                on_step(step)
            shown = max(shown, len(job["metrics"]))
            if job["status"] in ("failed", "cancelled"):
                raise JobFailed(f"job {job_id} {job['status']}: {job['error']}")
            if job["published"]:
                return job
            time.sleep(0.05)
        raise JobFailed(f"job {job_id} took longer than {timeout:.0f} s")
