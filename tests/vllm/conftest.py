from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.local import LocalStack
from tests.vllm.server import VllmServer, service_for, wait_engine
from tests.vllm.tenant import Tenant

Served = tuple[LocalStack, Tenant]


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm") / "vllm.log")
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def serve(vllm: VllmServer, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """The service in front of the engine, with settings by name."""
    with ExitStack() as stack:

        def start(*parts: str, **settings: str) -> Served:
            local = service_for(vllm, tmp_path / "data", {k.upper(): v for k, v in settings.items()})
            stack.callback(local.stop)
            local.start("service", *parts)
            wait_engine(local)
            tenant = Tenant(local.url, local.api_key)
            stack.callback(tenant.close)
            return local, tenant

        yield start
