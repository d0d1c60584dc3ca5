"""The supervisor's side of the training process: start, feed, listen, stop, kill. Imports no torch.

The process is one per worker and keeps the base model resident between jobs. Nothing it does can reach the service:
it has no URL and no token, only a socket to this object. It dies with the supervisor (see worker/child.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from api_schemas.worker import Lease
from worker.errors import PEER_LOST, TrainerDiedError, TrainerTakenError, TrainerUnavailableError
from worker.followers import Followers, meeting_place
from worker.messages import Failed, Outcome, Progress, Ready, Step, Stop, Train, frame, read_event
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)
Listener = Callable[[Progress | Step | Outcome], None]
OWN_TURN = ("training", "writing")
"""Phases in which the process works on one run alone."""
PEER_SECONDS = 10.0
"""Most that is waited for the news of which rank went first."""
SECRETS = ("PERENNIAL_WORKER_TOKEN", "PERENNIAL_WORKER_TOKEN_FILE")


@dataclass
class _Running:
    process: Process
    writer: asyncio.StreamWriter
    ready: asyncio.Future[Ready]
    followers: Followers
    listening: asyncio.Task[None] = field(init=False)
    unwanted: bool = False
    """We end it ourselves: that it dies says nothing about the machine."""
    blamed: str | None = None
    """The run for whose sake we do."""
    cause: str = ""
    """Why it was ended, where another rank died first."""
    cause_known: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Run:
    run_id: str
    listener: Listener
    child: _Running
    outcome: asyncio.Future[Outcome]
    answer: Outcome | None = None
    """The first rank's, while others are still at it."""


class TrainerProcess:
    """At most one training process, started when first needed and again after it has died. It may hold several leases:
    it works on one after the other, and what it says of one is a sign of life to all."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._child: _Running | None = None
        self._runs: dict[str, _Run] = {}
        self._in_training: str | None = None
        """The run whose own turn it is, as far as the process has said so."""
        self._failed: _Run | None = None
        """Whose failure some ranks may not have come to yet."""
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    async def ready(self) -> Ready:
        """Start the process if there is none and wait for its model. Raises TrainerUnavailableError."""
        async with self._starting:
            if self._failed is not None and not await self._all_idle(self._failed):
                await self.kill()
            self._failed = None
            if self._child is None or self._child.listening.done():
                await self.kill()
                self._child = await self._start()
            child = self._child
        try:
            return await asyncio.shield(child.ready)
        except TrainerDiedError as error:
            raise TrainerUnavailableError(f"the base model could not be loaded: {error}") from error

    async def train(self, lease: Lease, listener: Listener) -> Outcome:
        """Work on one lease; `listener` hears progress, that of other leases too. Raises TrainerDiedError, and as its
        kind TrainerTakenError when the process was ended for another lease's sake."""
        await self.ready()
        if (child := self._child) is None:
            raise TrainerTakenError("the training process was ended in that moment")
        run = _Run(lease.run_id, listener, child, asyncio.get_running_loop().create_future())
        assert run.run_id not in self._runs  # noqa: S101 - a run is leased once
        self._runs[run.run_id] = run
        try:
            await self._send(child, Train(lease=lease))
            outcome = await asyncio.shield(run.outcome)
        finally:
            if run.outcome.done():
                self._runs.pop(lease.run_id, None)
        if isinstance(outcome, Failed) and outcome.poisoned:
            await self.kill(lease.run_id)
        return outcome

    async def stop(self, run_id: str, grace_seconds: float) -> None:
        """Ask for a stop between two steps. What has not stopped within the grace is killed, unless the process is
        busy with another run: then this one has not begun, and will not."""
        if (run := self._runs.get(run_id)) is None:
            return
        await self._send(run.child, Stop(run_id=run_id))
        done, _ = await asyncio.wait({run.outcome}, timeout=grace_seconds)
        if not done and (self._in_training == run_id or len(self._runs) == 1):
            await self.kill(run_id)
        self._forget(run_id)

    async def kill(self, run_id: str | None = None) -> None:
        """End the process now and wait until it is gone; `run_id`: for this run's sake, the others' work is taken
        from them."""
        child, self._child = self._child, None
        if child is not None:
            if child.process.returncode is None:
                child.unwanted = True
                child.blamed = run_id
                child.process.kill()
            child.cause_known.set()
            await child.followers.kill()
            await child.listening
        for held in list(self._runs.values()):
            if held.child is child:
                self._forget(held.run_id)

    async def _all_idle(self, run: _Run) -> bool:
        """After a failure: whether every rank has soon come to an end of its own. One that waits has not."""
        deadline = asyncio.get_running_loop().time() + self._settings.stop_grace_seconds
        while self._child is not None and asyncio.get_running_loop().time() < deadline:
            if run.answer is not None and self._child.followers.done(run.run_id):
                return True
            await asyncio.sleep(0.02)
        return self._child is None

    def _forget(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None and run.outcome.done() and not run.outcome.cancelled():
            run.outcome.exception()  # looked at: asyncio need not report it

    async def _start(self) -> _Running:
        ours, theirs = socket.socketpair()
        store, environment = meeting_place(self._settings.ranks, _environment(os.environ))
        with theirs, store or nullcontext():
            handed = (theirs.fileno(), *((store.fileno(),) if store else ()))
            process = await asyncio.create_subprocess_exec(
                *self._argv(*handed),
                stdin=DEVNULL,
                stdout=2,  # what libraries print joins the log
                pass_fds=handed,
                env=environment,
                start_new_session=True,  # Ctrl-C is the supervisor's to handle
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        child = _Running(process, writer, ready, Followers(self._settle, lambda *how: self._follower_died(child, *how)))
        child.listening = asyncio.create_task(self._listen(child, reader))
        await child.followers.start(lambda _, channel: self._argv(channel), self._settings.ranks, environment)
        log.info("training process started pid=%d", process.pid)
        return child

    def _argv(self, channel: int, store: int | None = None) -> list[str]:
        s = self._settings
        flags = {
            "--channel-fd": channel,
            "--parent-pid": os.getpid(),
            "--model": s.model,
            "--base-model": s.base_model,
            "--adapters-root": s.adapters_root,
            "--device": s.device,
            "--dtype": s.dtype,
            "--quantise": s.quantise,
            "--batch-tokens": s.batch_tokens,
            "--warm-bytes": s.warm_bytes,
            "--leases-at-once": s.leases_at_once,
            "--ranks": s.ranks,
            "--threads": s.threads,
            "--store-fd": store,
        }
        words = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        switches = {"--shard": s.shard, "--compile-layers": s.compile_layers}
        return [sys.executable, "-m", "worker.child", *words, *(flag for flag, on in switches.items() if on)]

    async def _send(self, child: _Running, message: Train | Stop) -> None:
        try:
            child.writer.write(frame(message))
            await child.writer.drain()
        except ConnectionError:
            pass  # it died: `_listen` says so where somebody waits
        await child.followers.send(message)

    async def _listen(self, child: _Running, reader: asyncio.StreamReader) -> None:
        process, ready = child.process, child.ready
        try:
            while (event := await read_event(reader)) is not None:
                if isinstance(event, Ready):
                    ready.set_result(event)
                else:
                    self._deliver(event)
        except ValueError as error:
            log.error("the training process does not speak the protocol: %s", type(error).__name__)
            child.unwanted = True
            process.kill()
        child.writer.close()
        status = await process.wait()
        if status == PEER_LOST and not child.unwanted:
            with suppress(TimeoutError):  # who went first is about to be heard of
                await asyncio.wait_for(child.cause_known.wait(), PEER_SECONDS)
        child.followers.end()
        died = TrainerDiedError(child.cause or _epitaph(status, child.unwanted))
        log.info("training process gone pid=%d: %s", process.pid, died)
        if not ready.done():
            ready.set_exception(died)
            ready.exception()  # looked at: nobody may be waiting
        self._in_training = None
        for run in self._runs.values():
            if run.child is child and not run.outcome.done():
                taken = child.blamed is not None and child.blamed != run.run_id
                run.outcome.set_exception(TrainerTakenError(str(died)) if taken else died)

    def _deliver(self, event: Progress | Step | Outcome) -> None:
        """The last words of a run that was given up are a sign of life as well."""
        begun = isinstance(event, Step) or (isinstance(event, Progress) and event.phase in OWN_TURN)
        self._in_training = event.run_id if begun else None
        for run in self._runs.values():
            if not run.outcome.done() and (run.run_id != event.run_id or isinstance(event, Progress | Step)):
                run.listener(event)
        if isinstance(event, Progress | Step):
            return
        ended = self._runs.get(event.run_id, self._failed)
        if ended is not None and ended.run_id == event.run_id and ended.answer is None:
            ended.answer = event
            self._settle(event.run_id, event if isinstance(event, Failed) else None)

    def _settle(self, run_id: str, failed: Failed | None) -> None:
        """One rank has come to its end of a run: the run is over with the last of them, or with a failure of any."""
        run = self._runs.get(run_id)
        if run is None or run.outcome.done():
            return
        if failed is not None:
            self._failed = run
            run.outcome.set_result(failed)
        elif run.answer is not None and run.child.followers.done(run_id):
            run.outcome.set_result(run.answer)

    def _follower_died(self, child: _Running, rank: int, status: int) -> None:
        """Nothing can be done without it: the first rank goes as well, and says why."""
        if status != PEER_LOST:
            child.cause = child.cause or f"of rank {rank}: {_epitaph(status, unwanted=False)}"
            child.cause_known.set()
        if child.process.returncode is None:
            child.process.kill()
        child.followers.end()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: no service token, no telemetry or downloads, deterministic CUDA matrix products, no
    processes beside it that compile."""
    kept = {name: value for name, value in environment.items() if name not in SECRETS}
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return kept | own | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def _epitaph(returncode: int, unwanted: bool) -> str:
    if unwanted:
        return "the worker has ended its training process"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", often the kernel's answer to running out of memory" if -returncode == signal.SIGKILL else ""
        return f"the training process was ended by {name}{hint}"
    return f"the training process ended with exit status {returncode}"
