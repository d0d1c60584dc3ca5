"""The service before one vLLM, to be asked the same as vLLM itself."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import openai
from sqlalchemy import text

from demo.run import BASE_MODEL
from service.db.engine import Database
from service.local import LocalStack

Json = dict[str, Any]


class Front:
    """The service before one vLLM, both to be asked the same."""

    def __init__(self, vllm_url: str, stack: LocalStack) -> None:
        self.vllm_url, self.stack = vllm_url, stack
        self.direct = httpx2.Client(base_url=vllm_url, timeout=120)
        self.gateway = httpx2.Client(
            base_url=stack.url, timeout=120, headers={"authorization": f"Bearer {stack.api_key}"}
        )
        self._database = Database(f"sqlite:///{stack.data / 'perennial.db'}")

    def own(self, path: str, body: Json) -> Json:
        """vLLM's own whole answer, with everything about its tokens."""
        known = {"return_token_ids": True, "logprobs": body.get("logprobs", 0) if "prompt" in body else True}
        answer = self.direct.post(path, json={"model": BASE_MODEL} | body | known)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def streamed(self, path: str, body: Json) -> list[Json]:
        """The gateway's chunks."""
        with self.gateway.stream("POST", path, json={"model": BASE_MODEL, "stream": True} | body) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]", lines[-1]
        return [json.loads(line) for line in lines[:-1]]

    def kept(self, rollout_id: str) -> Json:
        with self._database.read() as s:
            found = s.execute(text("SELECT * FROM rollouts WHERE id = :id"), {"id": rollout_id}).mappings().one()
        lists = ("messages", "tools", "reply", "prompt_token_ids", "response_token_ids", "logprobs", "sampling")
        return dict(found) | {k: json.loads(found[k]) if found[k] else None for k in lists}

    def openai(self, name: str) -> openai.OpenAI:
        url, key = (self.vllm_url, "none") if name == "direct" else (self.stack.url, self.stack.api_key)
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def metric(self, name: str) -> float:
        found = re.findall(rf"^{re.escape(name)} (\S+)$", self.direct.get("/metrics").text, re.MULTILINE)
        return float(found[0])

    def close(self) -> None:
        for each in (self.direct, self.gateway, self._database):
            each.close()
