"""`python -m worker`: lease jobs from a service and train them. Exit status: 0 after a shutdown by signal, 1 when the
base model does not fit or cannot be loaded, 2 for wrong settings, 3 when the service does not take this worker."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from worker import preflight
from worker.errors import DoesNotFitError, RefusedError, TrainerUnavailableError, UnauthorisedError
from worker.service_client import ServiceClient, http_client
from worker.settings import WorkerSettings, from_flags
from worker.supervisor import Supervisor
from worker.trainer_process import TrainerProcess

log = logging.getLogger("worker")


async def work(settings: WorkerSettings, token: str) -> None:
    """Run a supervisor until SIGTERM or SIGINT."""
    async with http_client(str(settings.service_url), token) as http:
        supervisor = Supervisor(settings, ServiceClient(http), TrainerProcess(settings))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stopping.set)
        log.info("worker %s serves %s", settings.worker_id, settings.base_model)
        await supervisor.run()
    log.info("worker %s stopped", settings.worker_id)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        settings = from_flags(sys.argv[1:] if arguments is None else arguments)
        token = settings.read_token()
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            log.error("setting %s: %s", ".".join(map(str, problem["loc"])) or "worker", problem["msg"])
        return 2
    except (OSError, ValueError) as error:
        log.error("the worker token cannot be read: %s", error)
        return 2
    try:
        preflight.check_worker(settings)
        asyncio.run(work(settings, token))
    except (DoesNotFitError, TrainerUnavailableError) as error:
        log.error("%s", error)
        return 1
    except (UnauthorisedError, RefusedError) as error:
        log.error("the service does not take this worker: %s", error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
