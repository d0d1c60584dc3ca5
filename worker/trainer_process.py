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
from worker.errors import PEER_LOST, TrainerDiedError, TrainerUnavailableError
from worker.followers import Followers, meeting_place
from worker.messages import Failed, Outcome, Progress, Ready, Step, Stop, Train, frame, read_event
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)
Listener = Callable[[Progress | Step], None]
PEER_SECONDS = 10.0
"""Most that is waited for the news of which rank went first."""
SECRETS = ("PERENNIAL_WORKER_TOKEN", "PERENNIAL_WORKER_TOKEN_FILE")


@dataclass
class _Run:
    run_id: str
    listener: Listener
    outcome: asyncio.Future[Outcome]
    answer: Outcome | None = None
    """The first rank's, while others are still at it."""


@dataclass
class _Running:
    process: Process
    writer: asyncio.StreamWriter
    ready: asyncio.Future[Ready]
    followers: Followers
    listening: asyncio.Task[None] = field(init=False)
    unwanted: bool = False
    """We end it ourselves: that it dies says nothing about the machine."""
    cause: str = ""
    """Why it was ended, where another rank died first."""
    cause_known: asyncio.Event = field(default_factory=asyncio.Event)


class TrainerProcess:
    """At most one training process, started when first needed and again after it has died."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._child: _Running | None = None
        self._run: _Run | None = None
        self._failed: _Run | None = None
        """Whose failure some ranks may not have come to yet."""

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    async def ready(self) -> Ready:
        """Start the process if there is none and wait for its model. Raises TrainerUnavailableError."""
        if self._failed is not None and not await self._all_idle(self._failed):
            await self.kill()
        self._failed = None
        if self._child is None or self._child.listening.done():
            await self.kill()
            self._child = await self._start()
        try:
            return await asyncio.shield(self._child.ready)
        except TrainerDiedError as error:
            raise TrainerUnavailableError(f"the base model could not be loaded: {error}") from error

    async def train(self, lease: Lease, listener: Listener) -> Outcome:
        """Work on one lease; `listener` hears progress. Raises TrainerDiedError. One lease at a time."""
        await self.ready()
        assert self._run is None  # noqa: S101 - one caller, one lease at a time
        run = self._run = _Run(lease.run_id, listener, asyncio.get_running_loop().create_future())
        try:
            await self._send(Train(lease=lease))
            outcome = await asyncio.shield(run.outcome)
        finally:
            if run.outcome.done():
                self._run = None
        if isinstance(outcome, Failed) and outcome.poisoned:
            await self.kill()
        return outcome

    async def stop(self, grace_seconds: float) -> None:
        """Ask for a stop between two steps; kill what has not stopped within the grace."""
        if self._run is None:
            return
        await self._send(Stop(run_id=self._run.run_id))
        done, _ = await asyncio.wait({self._run.outcome}, timeout=grace_seconds)
        if not done:
            await self.kill()
        self._forget_run()

    async def kill(self) -> None:
        """End the process now and wait until it is gone."""
        child, self._child = self._child, None
        if child is not None:
            if child.process.returncode is None:
                child.unwanted = True
                child.process.kill()
            child.cause_known.set()
            await child.followers.kill()
            await child.listening
        self._forget_run()

    async def _all_idle(self, run: _Run) -> bool:
        """After a failure: whether every rank has soon come to an end of its own. One that waits has not."""
        deadline = asyncio.get_running_loop().time() + self._settings.stop_grace_seconds
        while self._child is not None and asyncio.get_running_loop().time() < deadline:
            if run.answer is not None and self._child.followers.done(run.run_id):
                return True
            await asyncio.sleep(0.02)
        return self._child is None

    def _forget_run(self) -> None:
        if self._run is not None and self._run.outcome.done() and not self._run.outcome.cancelled():
            self._run.outcome.exception()  # looked at: asyncio need not report it
        self._run = None

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
        flags = (
            {
                "--channel-fd": channel,
                "--parent-pid": os.getpid(),
                "--model": s.model,
                "--base-model": s.base_model,
                "--adapters-root": s.adapters_root,
                "--device": s.device,
                "--dtype": s.dtype,
                "--quantise": s.quantise,
                "--batch-tokens": s.batch_tokens,
                "--ranks": s.ranks,
            }
            | ({"--threads": s.threads} if s.threads else {})
            | ({} if store is None else {"--store-fd": store})
        )
        words = [str(word) for pair in flags.items() for word in pair]
        return [sys.executable, "-m", "worker.child", *words, *(["--shard"] if s.shard else [])]

    async def _send(self, message: Train | Stop) -> None:
        assert self._child is not None  # noqa: S101 - callers hold a run
        child = self._child
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
        if self._run is not None and not self._run.outcome.done():
            self._run.outcome.set_exception(died)

    def _deliver(self, event: Progress | Step | Outcome) -> None:
        run = self._run or self._failed
        if run is None or run.run_id != event.run_id or run.answer is not None:
            return  # the last words of a run that was given up
        if isinstance(event, Progress | Step):
            if not run.outcome.done():
                run.listener(event)
        else:
            run.answer = event
            self._settle(run.run_id, event if isinstance(event, Failed) else None)

    def _settle(self, run_id: str, failed: Failed | None) -> None:
        """One rank has come to its end of a run: the run is over with the last of them, or with a failure of any."""
        run = self._run
        if run is None or run.run_id != run_id or run.outcome.done():
            return
        if failed is not None:
            self._failed = run
            run.outcome.set_result(failed)
        elif run.answer is not None and self._child is not None and self._child.followers.done(run_id):
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
    """The child's environment: no service token, no telemetry or downloads, deterministic CUDA matrix products."""
    kept = {name: value for name, value in environment.items() if name not in SECRETS}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def _epitaph(returncode: int, unwanted: bool) -> str:
    if unwanted:
        return "the worker has ended its training process"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", often the kernel's answer to running out of memory" if -returncode == signal.SIGKILL else ""
        return f"the training process was ended by {name}{hint}"
    return f"the training process ended with exit status {returncode}"
