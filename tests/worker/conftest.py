"""A tiny model, a service with behaviour at the HTTP port, and real worker processes between the two."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from api_schemas.preview import Preview, ResultRequest
from api_schemas.training import LoraSettings, ResolvedTraining, TrainingSettings, resolve
from api_schemas.worker import (
    CommitReply,
    CommitRequest,
    FailRequest,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeasedItem,
    LeaseRequest,
    ParentVersion,
    ReleaseRequest,
)
from worker.versions import directory_of, scan, version_digest

BASE = "tiny/base"
TOKEN = "a-worker-token"
PATIENCE = 180.0
"""Seconds after which an awaited event counts as missing."""
REPOSITORY = Path(__file__).parents[2]
TEMPLATE = (
    "{%- for m in messages -%}<s>{{ m.role }}: {{ m.content }}</s>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<s>assistant: {% endif -%}"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers over single bytes."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(words[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
        initializer_range=0.3, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base") / "tiny"
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


LORA = LoraSettings(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def training(**overrides: Any) -> ResolvedTraining:
    """Two steps at a rate that moves a tiny model visibly, on the answers that were sent, unless said otherwise."""
    usual = {"steps": 2, "learning_rate": 5e-3, "rollouts": "own"}
    return resolve(TrainingSettings(), TrainingSettings(**(usual | overrides)))


def item(number: int, feedback: str = "in capitals, please", *, words: int = 3, **fields: Any) -> LeasedItem:
    """An answer from outside the gateway: text alone."""
    values: dict[str, Any] = {
        "id": f"item-{number}",
        "messages": [{"role": "user", "content": f"name {number} things"}],
        "response": " ".join(["thing"] * words),
        "prompt_token_ids": None,
        "response_token_ids": None,
        "behaviour_logprobs": None,
        "version": None,
        "feedback": feedback,
        "demonstration": None,
        "standing": True,
    }
    return LeasedItem(**(values | fields))


@pytest.fixture(scope="session")
def make_item() -> Callable[..., LeasedItem]:
    return item


@pytest.fixture(scope="session")
def make_training() -> Callable[..., ResolvedTraining]:
    return training


@pytest.fixture(scope="session")
def make_lease() -> Callable[..., Lease]:
    """A lease as the service would grant it, any field replaceable."""

    def make(adapter_id: str = "adp_1", *, run_id: str = "run_1", items: int = 2, **fields: Any) -> Lease:
        values: dict[str, Any] = {
            "run_id": run_id,
            "token": 1,
            "lease_seconds": 30.0,
            "adapter_id": adapter_id,
            "adapter": "helper",
            "base_model": BASE,
            "lora": LORA,
            "training": training(),
            "seed": 11,
            "parent": None,
            "standing_feedback": [],
            "batch_ids": ["batch_1"],
            "items": [item(n) for n in range(items)],
        }
        return Lease(**(values | fields))

    return make


# --- the service at its HTTP port ------------------------------------------------------------------------------------


@dataclass
class Job:
    adapter_id: str
    items: list[LeasedItem]
    training: ResolvedTraining
    lora: LoraSettings
    base_model: str
    state: str = "queued"
    attempts: int = 0
    releases: int = 0
    error: dict[str, Any] | None = None
    run_id: str | None = None
    commit: CommitRequest | None = None
    kind: Literal["train", "preview"] = "train"
    preview: Preview | None = None
    beats: list[Heartbeat] = field(default_factory=list)


@dataclass
class Head:
    """What the service knows of one adapter."""

    token: int = 0
    holder: str | None = None
    until: float = 0.0
    versions: list[ParentVersion] = field(default_factory=list)
    standing: list[str] = field(default_factory=list)


class CutResponse(Response):
    """Announces a body and then closes the connection: an acknowledgement that never arrives."""

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"64")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class FakeService:
    """Leases, fences, commits and refuses like the real service, in memory. `wait` awaits any change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changed = threading.Condition()
        self.jobs: list[Job] = []
        self.heads: dict[str, Head] = {}
        self.runs: dict[str, tuple[Job, int]] = {}
        self.committed: dict[str, CommitReply] = {}
        self.answered: set[tuple[str, int]] = set()
        self.calls: list[str] = []
        self.lease_seconds = 3.0
        self.cut_commits = 0
        """So many commits and results are applied without their acknowledgement arriving."""
        self.unavailable = 0
        """So many calls on runs are answered 503, nothing done."""
        self.reject_versions = False
        self.cancel: set[int] = set()
        """Indices of jobs whose next heartbeat says that they are cancelled."""
        self.url = ""

    # what tests do

    def enqueue(self, adapter_id: str, items: int | list[LeasedItem] = 2, **settings: Any) -> int:
        """Queue a job; its index."""
        wanted = [item(n) for n in range(items)] if isinstance(items, int) else items
        with self.changed:
            self.jobs.append(
                Job(
                    adapter_id, wanted, training(**settings.pop("training", {})), settings.pop("lora", LORA),
                    settings.pop("base_model", BASE), kind=settings.pop("kind", "train"),
                )
            )  # fmt: skip
            assert not settings, f"unknown settings {settings}"
            self.changed.notify_all()
            return len(self.jobs) - 1

    def wait(self, what: Callable[[], Any], why: str = "") -> None:
        with self.changed:
            assert self.changed.wait_for(what, PATIENCE), why or f"never happened; jobs: {self.jobs}"

    def wait_for_state(self, job: int, *states: str) -> Job:
        self.wait(lambda: self.jobs[job].state in states, f"job {job} never {states}: {self.jobs[job].state}")
        return self.jobs[job]

    def wait_for_steps(self, job: int) -> Job:
        """Until a heartbeat has reported a step of this job."""
        self.wait(lambda: any(b.metrics for b in self.jobs[job].beats), f"job {job} never reported a step")
        return self.jobs[job]

    def fence(self, job: int) -> None:
        """Take the adapter away from whoever holds it, as an expired lease or a cancellation would."""
        with self.changed:
            head = self.heads[self.jobs[job].adapter_id]
            head.token, head.holder = head.token + 1, None
            self.jobs[job].state = "fenced"
            self.changed.notify_all()

    # what workers ask

    def lease(self, request: LeaseRequest) -> Lease | None:
        with self.changed:
            self.changed.wait_for(lambda: self._claimable(request), request.wait_seconds)
            job = self._claimable(request)
            if job is None:
                return None
            head = self.heads.setdefault(job.adapter_id, Head())
            head.token += 1
            run_id = f"run_{len(self.runs) + 1}"
            self.runs[run_id] = (job, head.token)
            head.holder, head.until = run_id, time.monotonic() + self.lease_seconds
            job.run_id, job.state = run_id, "running"
            self.changed.notify_all()
            return Lease(
                kind=job.kind,
                run_id=run_id, token=head.token, lease_seconds=self.lease_seconds, adapter_id=job.adapter_id,
                adapter="helper", base_model=job.base_model, lora=job.lora, training=job.training,
                seed=1, parent=head.versions[-1] if head.versions else None,
                standing_feedback=list(head.standing), batch_ids=["batch_1"], items=job.items,
            )  # fmt: skip

    def _claimable(self, request: LeaseRequest) -> Job | None:
        for head in self.heads.values():
            if head.holder and head.until < time.monotonic():  # its worker is dead or frozen
                self.runs[head.holder][0].state, head.holder = "queued", None
        held = {name for name, head in self.heads.items() if head.holder}
        wanted = (j for j in self.jobs if j.base_model == request.base_model and j.state == "queued")
        return next((j for j in wanted if j.adapter_id not in held), None)

    def held(self, run_id: str, token: int) -> tuple[Job, Head] | JSONResponse:
        if run_id not in self.runs:
            return refusal(404, "run_not_found")
        job, granted = self.runs[run_id]
        head = self.heads[job.adapter_id]
        if token != granted or token != head.token or head.holder != run_id:
            return refusal(409, "lease_lost")
        return job, head

    def heartbeat(self, run_id: str, beat: Heartbeat) -> Response:
        found = self.held(run_id, beat.token)
        if isinstance(found, JSONResponse):
            return found
        job, head = found
        job.beats.append(beat)
        head.until = time.monotonic() + self.lease_seconds
        if cancelled := self.jobs.index(job) in self.cancel:
            head.holder, job.state = None, "cancelled"
        return reply(HeartbeatReply(lease_seconds=self.lease_seconds, cancelled=cancelled))

    def commit(self, run_id: str, request: CommitRequest) -> Response:
        if run_id not in self.committed:
            found = self.held(run_id, request.token)
            if isinstance(found, JSONResponse):
                return found
            job, head = found
            if refused := self._inadmissible(run_id, job, request):
                head.holder, job.state = None, "failed"
                job.error = {"code": "version_rejected", "message": refused}
                return refusal(422, "version_rejected", refused)
            digest = version_digest(request.files)
            head.versions.append(ParentVersion(version=len(head.versions) + 1, uri=request.uri, digest=digest))
            head.standing, head.holder = list(request.standing_feedback), None
            job.state, job.commit = "succeeded", request
            self.committed[run_id] = CommitReply(version=len(head.versions), digest=digest)
        if self.cut_commits:
            self.cut_commits -= 1
            return CutResponse()
        return reply(self.committed[run_id])

    def _inadmissible(self, run_id: str, job: Job, request: CommitRequest) -> str | None:
        """What a careful service checks: the place, and every byte."""
        if self.reject_versions:
            return "told to refuse"
        if request.uri != f"{job.adapter_id}/{run_id}":
            return "another run's place"
        names = {f.name for f in request.files}
        if not {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names:
            return "no PEFT directory"
        on_disk = {f.name: f for f in scan(directory_of(self.root, request.uri))}
        return None if on_disk == {f.name: f for f in request.files} else "other bytes than declared"

    def result(self, run_id: str, request: ResultRequest) -> Response:
        if (run_id, request.token) not in self.answered:
            found = self.held(run_id, request.token)
            if isinstance(found, JSONResponse):
                return found
            job, head = found
            head.holder, job.state, job.preview = None, "succeeded", request.preview
            self.answered.add((run_id, request.token))
        if self.cut_commits:
            self.cut_commits -= 1
            return CutResponse()
        return Response(status_code=204)

    def fail(self, run_id: str, request: FailRequest) -> Response:
        found = self.held(run_id, request.token)
        if isinstance(found, JSONResponse):
            return found
        job, head = found
        job.attempts += 1
        job.error = request.error.model_dump() | {"retryable": request.retryable}
        head.holder, job.state = None, "failed"
        return Response(status_code=204)

    def release(self, run_id: str, request: ReleaseRequest) -> Response:
        found = self.held(run_id, request.token)
        if isinstance(found, JSONResponse):
            return found
        job, head = found
        head.holder, job.state = None, "released"
        job.releases += 1
        return Response(status_code=204)


def refusal(status: int, code: str, message: str = "refused") -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "type": "conflict_error"}}, status)


def reply(body: CommitReply | HeartbeatReply | Lease) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


_BODIES = {
    "heartbeat": Heartbeat,
    "commit": CommitRequest,
    "result": ResultRequest,
    "fail": FailRequest,
    "release": ReleaseRequest,
}


def port_of(service: FakeService) -> FastAPI:
    """The worker API over a fake service."""
    app = FastAPI()

    def admitted(request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"

    @app.post("/worker/v1/leases")
    async def lease(request: Request) -> Response:
        if not admitted(request):
            return refusal(401, "invalid_api_key")
        wanted = LeaseRequest.model_validate_json(await request.body())
        granted = await asyncio.to_thread(service.lease, wanted)
        return Response(status_code=204) if granted is None else reply(granted)

    @app.post("/worker/v1/runs/{run_id}/{action}")
    async def on_run(run_id: str, action: str, request: Request) -> Response:
        if not admitted(request):
            return refusal(401, "invalid_api_key")
        body: Any = _BODIES[action].model_validate_json(await request.body())
        with service.changed:
            service.calls.append(f"{action} {run_id}")
            if service.unavailable:
                service.unavailable -= 1
                return refusal(503, "unavailable")
            answer: Response = getattr(service, action)(run_id, body)
            service.changed.notify_all()
            return answer

    return app


def serve(service: FakeService) -> Iterator[FakeService]:
    """The fake behind a real port for as long as the generator is held."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(port_of(service), log_level="critical", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield service
        server.should_exit = True
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeService]:
    yield from serve(FakeService(tmp_path_factory.mktemp("adapters")))


# --- real worker processes -------------------------------------------------------------------------------------------


class WorkerProcess:
    """`python -m worker` as an operator runs it, its log in a file."""

    def __init__(
        self, service: FakeService, model_dir: Path, log: Path, token: str = TOKEN, **environment: str
    ) -> None:
        self.log_path = log
        flags = {
            "--service-url": service.url, "--model": model_dir, "--base-model": BASE,
            "--adapters-root": service.root, "--worker-id": "w1", "--device": "cpu", "--threads": 1,
        }  # fmt: skip
        settings = os.environ | {
            "PERENNIAL_WORKER_TOKEN": token, "PERENNIAL_WORKER_POLL_SECONDS": "0.2",
            "PERENNIAL_WORKER_OUTAGE_PATIENCE_SECONDS": "30", "OMP_NUM_THREADS": "1",
        } | environment  # fmt: skip
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", *(str(w) for pair in flags.items() for w in pair)],
                cwd=REPOSITORY, env=settings, stderr=stream, stdout=stream, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def children(self) -> list[int]:
        """Pids of the processes that the supervisor has started."""
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def start_worker(service: FakeService, model_dir: Path, log: Path, **options: Any) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(service, model_dir, log, **options)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def worker(service: FakeService, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """One worker for a module's tests: they use adapters of their own, and it has to survive them all."""
    yield from start_worker(service, model_dir, tmp_path_factory.mktemp("log") / "worker.log")


@pytest.fixture
def make_worker(service: FakeService, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers that a test may end as it likes."""
    held: list[Iterator[WorkerProcess]] = []

    def start(model: Path, **options: Any) -> WorkerProcess:
        held.append(start_worker(service, model, tmp_path / f"worker-{len(held)}.log", **options))
        return next(held[-1])

    yield start
    for running in held:
        next(running, None)


@pytest.fixture
def another_worker(make_worker: Callable[..., WorkerProcess], model_dir: Path) -> Callable[..., WorkerProcess]:
    """Like `make_worker`, with the tiny model."""
    return lambda **options: make_worker(model_dir, **options)


def exited(pid: int) -> None:
    """Wait until a process that is not our child is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


@pytest.fixture(scope="session")
def wait_for_exit() -> Callable[[int], None]:
    return exited


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], Any]:
    return lambda path: json.loads(path.read_bytes())
