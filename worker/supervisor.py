"""The worker's main loop: make sure the model is there, lease, run, repeat. Imports no torch.

Whatever happens to a run happens to that run alone; the loop ends on a shutdown, on a token the service does not take,
or when the base model cannot be loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from api_schemas.worker import Lease, LeaseRequest
from worker.attempt import Attempt, backoff
from worker.errors import LeaseLostError, RefusedError, ServiceUnavailableError
from worker.service_client import ServiceClient
from worker.settings import WorkerSettings
from worker.trainer_process import TrainerProcess

log = logging.getLogger(__name__)


class Supervisor:
    """Leases runs one after the other until `stopping` is set."""

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
                    await self._one_lease()
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

    async def _one_lease(self) -> None:
        s = self._settings
        request = LeaseRequest(worker_id=s.worker_id, base_model=s.base_model, wait_seconds=s.poll_seconds)
        lease = await self._client.lease(request)  # not cut short by a shutdown: a granted lease is never orphaned
        if lease is None:
            return
        if self.stopping.is_set():
            await self._hand_back(lease)
            return
        log.info("run %s: leased for %s, %d items", lease.run_id, lease.adapter_id, len(lease.items))
        await Attempt(lease, self._client, self._trainer, self.stopping, s).run()

    async def _hand_back(self, lease: Lease) -> None:
        with contextlib.suppress(ServiceUnavailableError, LeaseLostError, RefusedError):  # else it runs out by itself
            await self._client.release(lease.run_id, lease.token)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
