"""The worker's main loop: make sure the model is there, lease, run, repeat. Imports no torch.

Whatever happens to a run happens to that run alone; the loop ends on a shutdown, on a token the service does not take,
or when the base model cannot be loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator, Sequence

from api_schemas.worker import Lease, LeaseRequest
from worker.attempt import Attempt, backoff
from worker.errors import LeaseLostError, RefusedError, ServiceUnavailableError, WorkerError
from worker.service_client import ServiceClient
from worker.settings import WorkerSettings
from worker.trainer_process import TrainerProcess

log = logging.getLogger(__name__)


class Supervisor:
    """Leases runs, a few at a time if it is told so, until `stopping` is set."""

    def __init__(self, settings: WorkerSettings, client: ServiceClient, trainer: TrainerProcess) -> None:
        self.stopping = asyncio.Event()
        self._settings = settings
        self._client = client
        self._trainer = trainer

    async def run(self) -> None:
        """Work until told to stop. Raises UnauthorisedError, RefusedError or TrainerUnavailableError."""
        pauses = backoff()
        try:
            while not self.stopping.is_set() and await self._trainer_ready():
                try:
                    await self._round()
                    pauses = backoff()
                except ServiceUnavailableError as error:
                    log.warning("no lease: %s", error)
                    await self._pause(next(pauses))
        finally:
            await self._trainer.kill()

    async def _trainer_ready(self) -> bool:
        """True once the base model is resident; False when a shutdown came first."""
        ready = asyncio.create_task(self._trainer.ready())
        stop = asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
            return not stop.done()
        finally:
            for task in (ready, stop):
                task.cancel()
            await asyncio.gather(ready, stop, return_exceptions=True)

    async def _round(self) -> None:
        """One lease, and as many more as there is work for at this moment, each of an adapter of its own; all of them
        to their end."""
        leases: list[Lease] = []
        while len(leases) < self._settings.leases_at_once and (lease := await self._another(leases)) is not None:
            leases.append(lease)
        if self.stopping.is_set():
            await asyncio.gather(*map(self._hand_back, leases))
            return
        for lease in leases:
            log.info("run %s: leased for %s, %d items", lease.run_id, lease.adapter_id, len(lease.items))
        ends = await asyncio.gather(*self._attempts(leases), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _another(self, leases: Sequence[Lease]) -> Lease | None:
        """The first is waited for. None as well when the service gives no answer, or a refusal,
        and a lease is held already: what is wrong is seen again when that one is done."""
        s = self._settings
        wait = 0.0 if leases else s.poll_seconds
        request = LeaseRequest(worker_id=s.worker_id, base_model=s.base_model, wait_seconds=wait)
        try:
            return await self._client.lease(request)  # not cut short by a shutdown: a granted lease is never orphaned
        except WorkerError:
            if not leases:
                raise
            return None

    def _attempts(self, leases: Sequence[Lease]) -> Iterator[Awaitable[None]]:
        fetching = asyncio.Lock()
        for lease in leases:
            beside = [other for other in leases if other is not lease]
            yield Attempt(lease, self._client, self._trainer, self.stopping, self._settings, fetching, beside).run()

    async def _hand_back(self, lease: Lease) -> None:
        with contextlib.suppress(ServiceUnavailableError, LeaseLostError, RefusedError):  # else it runs out by itself
            await self._client.release(lease.run_id, lease.token)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
