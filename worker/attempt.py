"""One lease, from its grant to commit or result, failure, release or loss. Imports no torch.

Three things happen side by side: the work (train and commit, or preview), the heartbeats, and the wait for a shutdown.
The first to end decides. Giving up is always safe: what a run has written is invisible until the service commits it,
and the service commits nothing under an old token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import TypeVar

from api_schemas.jobs import JobError, JobProgress, StepMetrics
from api_schemas.preview import ResultRequest
from api_schemas.worker import CommitRequest, FailRequest, Heartbeat, Lease
from worker import transfer
from worker.errors import (
    LeaseLostError,
    RefusedError,
    ServiceUnavailableError,
    TrainerDiedError,
    TrainerTakenError,
    VersionRejectedError,
)
from worker.messages import Done, Failed, Outcome, Previewed, Progress, Step, Stopped
from worker.service_client import ServiceClient
from worker.settings import WorkerSettings
from worker.trainer_process import TrainerProcess
from worker.versions import discard

log = logging.getLogger(__name__)
T = TypeVar("T")
MIN_BEAT_SECONDS = 0.25
"""Fresh metrics are sent early, but not more often than this."""
PARTING_SECONDS = 2.0
MAX_METRICS_PER_BEAT = 256


class LeaseEnd(Enum):
    """Why the heartbeats ended."""

    LOST = "lease lost"
    CANCELLED = "cancelled"
    SILENT = "service silent for longer than the lease and the patience after it"
    REFUSED = "the service does not take the heartbeat"
    STALLED = "no sign of life from the training process"


def backoff(first: float = 0.2, most: float = 5.0) -> Iterator[float]:
    """Waiting times between tries, seconds: doubling up to `most`, each with jitter so that workers spread out."""
    delay = first
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret hangs on it
        delay = min(most, delay * 2)


class Attempt:
    """The life of one lease. `run` returns when nothing is left to do for it; UnauthorisedError travels out."""

    def __init__(
        self,
        lease: Lease,
        client: ServiceClient,
        trainer: TrainerProcess,
        stopping: asyncio.Event,
        settings: WorkerSettings,
        fetching: asyncio.Lock | None = None,
        beside: Sequence[Lease] = (),
    ) -> None:
        """`beside`: the other leases that are held; `fetching` is held while files are fetched, so that none sweeps
        away what another fetches."""
        self._lease = lease
        self._fetching = fetching or asyncio.Lock()
        self._beside = beside
        self._client = client
        self._trainer = trainer
        self._stopping = stopping
        self._settings = settings
        self._metrics: list[StepMetrics] = []
        self._progress: JobProgress | None = None
        self._news = asyncio.Event()
        self._result_sent = False
        self._last_heard = time.monotonic()

    async def run(self) -> None:
        """Train and commit under the lease, or give it up. Leaves the trainer idle or dead."""
        beats = asyncio.create_task(self._heartbeats())
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({beats, work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._result_sent and not work.done():  # its answer is near, and tells what really happened
                await asyncio.wait({work}, timeout=self._settings.stop_grace_seconds)
            if work.done():
                work.result()
                return
            work.cancel()  # first of all: it must not report the end that is now brought about
            if beats.done():
                await self._abandon(beats.result())
            else:
                await self._release()
        finally:
            for task in (beats, work, stop):
                task.cancel()
            await asyncio.gather(beats, work, stop, return_exceptions=True)

    async def _work(self) -> None:
        try:
            await self._finish(await self._train())
        except LeaseLostError:
            log.info("run %s: lease lost, dropped", self._lease.run_id)
            self._discard()
        except VersionRejectedError as error:
            log.warning("run %s: version refused by the service: %s", self._lease.run_id, error)
            if self._lease.files == "http":
                self._discard()
        except RefusedError as error:
            log.error("run %s: the service does not take the report: %s", self._lease.run_id, error)

    async def _train(self) -> Outcome:
        if self._lease.files == "http" and (failed := await self._fetch_parent()) is not None:
            return failed
        try:
            return await self._trainer.train(self._lease, self._hear)
        except TrainerTakenError:
            return await self._taken()
        except TrainerDiedError as error:
            return Failed(run_id=self._lease.run_id, code="trainer_died", message=str(error), retryable=True)

    async def _taken(self) -> Stopped:
        """Another run's end took the process along: the job goes back to the queue, and no attempt is counted."""
        self._discard()
        await self._until_answered(lambda: self._client.release(self._lease.run_id, self._lease.token))
        return Stopped(run_id=self._lease.run_id)

    async def _fetch_parent(self) -> Failed | None:
        lease, root = self._lease, self._settings.adapters_root
        try:
            async with self._fetching:
                await asyncio.to_thread(transfer.begin, root, lease, self._settings.cache_bytes, self._beside)
                await self._until_answered(partial(transfer.fetch_parent, self._client, lease, root, self._alive))
        except RefusedError as error:
            message = f"the parent's files are not to be had: {error}"
            return Failed(run_id=lease.run_id, code="parent_corrupt", message=message, retryable=False)
        except (OSError, ValueError) as error:
            return self._unusable(error)
        return None

    def _unusable(self, error: Exception) -> Failed:
        message = f"the directory of versions cannot be used: {type(error).__name__}"
        return Failed(run_id=self._lease.run_id, code="disk_failed", message=message, retryable=True)

    async def _finish(self, outcome: Outcome) -> None:
        if isinstance(outcome, Done):
            await self._commit(outcome)
        elif isinstance(outcome, Previewed):
            await self._answer(outcome)
        elif isinstance(outcome, Failed):
            await self._fail(outcome)
        else:
            assert isinstance(outcome, Stopped)  # noqa: S101 - all the others are above
            log.info("run %s: stopped", self._lease.run_id)

    async def _commit(self, done: Done) -> None:
        request = CommitRequest(
            token=self._lease.token,
            uri=done.uri,
            files=done.files,
            standing_feedback=done.standing_feedback,
            metrics=self._metrics,
            items=done.items,
            training_seconds=done.training_seconds,
            canary=done.canary,
        )
        try:
            if self._lease.files == "http" and (failed := await self._send_files(done)) is not None:
                await self._fail(failed)
                return
            self._result_sent = True
            reply = await self._until_answered(lambda: self._client.commit(self._lease.run_id, request))
        except RefusedError as error:
            log.error("run %s: the service does not take the commit: %s", self._lease.run_id, error)
            await self._fail(Failed(run_id=done.run_id, code="commit_refused", message=str(error), retryable=False))
            return
        log.info("run %s: committed as version %d of %s", self._lease.run_id, reply.version, self._lease.adapter_id)

    async def _send_files(self, done: Done) -> Failed | None:
        """Before the commit, where the service does not see what was written here."""
        lease, root = self._lease, self._settings.adapters_root
        try:
            for entry in done.files:
                await self._until_answered(partial(transfer.send, self._client, lease, entry, root, self._alive))
        except (OSError, ValueError) as error:
            return self._unusable(error)
        return None

    async def _answer(self, previewed: Previewed) -> None:
        request = ResultRequest(token=self._lease.token, preview=previewed.preview)
        self._result_sent = True
        try:
            await self._until_answered(lambda: self._client.result(self._lease.run_id, request))
        except RefusedError as error:
            await self._fail(
                Failed(run_id=previewed.run_id, code="result_refused", message=str(error), retryable=False)
            )
            return
        log.info("run %s: preview sent", self._lease.run_id)

    async def _fail(self, failed: Failed) -> None:
        log.warning("run %s: failed with %s (retryable: %s)", failed.run_id, failed.code, failed.retryable)
        if not self._result_sent:
            self._discard()
        error = JobError(code=failed.code, message=failed.message)
        request = FailRequest(token=self._lease.token, error=error, retryable=failed.retryable)
        await self._until_answered(lambda: self._client.fail(self._lease.run_id, request))

    async def _until_answered(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat until the service answers. The heartbeats beside it decide when that is hopeless."""
        for delay in backoff():
            try:
                return await call()
            except ServiceUnavailableError as error:
                log.warning("run %s: %s, trying again", self._lease.run_id, error)
                await asyncio.sleep(delay)
        raise AssertionError("backoff never ends")

    async def _heartbeats(self) -> LeaseEnd:
        """Beat until the lease ends. UnauthorisedError travels."""
        pause = self._lease.lease_seconds / 3
        deadline = time.monotonic() + self._lease.lease_seconds + self._settings.outage_patience_seconds
        sent = 0
        while True:
            await self._wait_for_beat(pause)
            if not self._result_sent and time.monotonic() - self._last_heard > self._settings.stall_seconds:
                return LeaseEnd.STALLED
            self._news.clear()
            upto = min(len(self._metrics), sent + MAX_METRICS_PER_BEAT)
            beat = Heartbeat(token=self._lease.token, progress=self._progress, metrics=self._metrics[sent:upto])
            began = time.monotonic()
            try:
                reply = await self._client.heartbeat(self._lease.run_id, beat)
            except LeaseLostError:
                return LeaseEnd.LOST
            except RefusedError as error:
                log.error("run %s: %s", self._lease.run_id, error)
                return LeaseEnd.REFUSED
            except ServiceUnavailableError:
                if time.monotonic() > deadline:
                    return LeaseEnd.SILENT
                pause = min(pause, 1.0)
                continue
            if reply.cancelled:
                return LeaseEnd.CANCELLED
            sent, pause = upto, reply.lease_seconds / 3
            deadline = began + reply.lease_seconds + self._settings.outage_patience_seconds

    async def _wait_for_beat(self, interval: float) -> None:
        """A third of the lease, or less when there is something new to tell."""
        shortest = min(MIN_BEAT_SECONDS, interval)
        await asyncio.sleep(shortest)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), interval - shortest)

    def _hear(self, event: Progress | Step | Outcome) -> None:
        self._alive()
        if event.run_id != self._lease.run_id:
            return
        if isinstance(event, Step):
            self._metrics.append(event.metrics)
        elif isinstance(event, Progress):
            self._progress = JobProgress(phase=event.phase, step=event.step, steps=event.steps)
        self._news.set()

    def _alive(self) -> None:
        self._last_heard = time.monotonic()

    async def _abandon(self, end: LeaseEnd) -> None:
        log.info("run %s: %s, giving up", self._lease.run_id, end.value)
        if end is LeaseEnd.CANCELLED or (self._beside and end is not LeaseEnd.STALLED):
            await self._trainer.stop(self._lease.run_id, self._settings.stop_grace_seconds)
        else:
            await self._trainer.kill()
        self._discard()
        if end is LeaseEnd.STALLED:
            await self._parting(self._client.fail(self._lease.run_id, self._stalled()))

    async def _release(self) -> None:
        """Shutdown: the job goes back to the queue at once instead of waiting for the lease to run out."""
        await self._trainer.stop(self._lease.run_id, self._settings.stop_grace_seconds)
        self._discard()
        await self._parting(self._client.release(self._lease.run_id, self._lease.token))

    async def _parting(self, call: Awaitable[None]) -> None:
        """The last word on a lease, said once: if it is not heard, the lease runs out by itself."""
        try:
            async with asyncio.timeout(PARTING_SECONDS):
                await call
        except (ServiceUnavailableError, LeaseLostError, RefusedError, TimeoutError) as error:
            log.info("run %s: %s, its lease will run out", self._lease.run_id, type(error).__name__)

    def _stalled(self) -> FailRequest:
        error = JobError(code="trainer_stalled", message=f"{LeaseEnd.STALLED.value}: it was killed")
        return FailRequest(token=self._lease.token, error=error, retryable=True)

    def _discard(self) -> None:
        s, lease = self._settings, self._lease
        ours = lease.files == "http" or not self._result_sent
        discard(s.adapters_root, lease.adapter_id, lease.run_id, lease.token, published=ours)
