"""Fixtures with a real vLLM. Every test of this directory carries the marker `vllm`; none is ever skipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from demo.client import Client
from demo.run import BASE_MODEL, MODEL_DIR
from service.local import LocalConfig, LocalStack
from tests.e2e.conftest import Running
from tests.vllm.front import Front
from tests.vllm.server import VllmConfig, VllmServer, wait_engine
from tests.vllm.tenant import Tenant

MakeServer = Callable[..., VllmServer]
Served = tuple[LocalStack, Tenant]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))  # the first one waits for the server: about a minute


@pytest.fixture(scope="session")
def make_vllm(tmp_path_factory: pytest.TempPathFactory) -> MakeServer:
    """A server of the demonstration model that is not started yet; keyword arguments are VllmConfig's."""

    def make(**config: object) -> VllmServer:
        log = tmp_path_factory.mktemp("vllm") / "vllm.log"
        return VllmServer(VllmConfig(MODEL_DIR, BASE_MODEL, log, **config))  # type: ignore[arg-type]

    return make


THINKING = {"reasoning_start_str": "<|im_start|>assistant", "reasoning_end_str": " done."}
"""The demonstration model thinks from the beginning of its answer, says this parser, until it has said the second."""

FLAGS = {
    "vllm": ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-log-requests"),
    "second_vllm": ("--logprobs-mode", "processed_logprobs", "--reasoning-config", json.dumps(THINKING)),
}


@pytest.fixture(scope="package")
def servers(request: pytest.FixtureRequest, make_vllm: MakeServer) -> Iterator[dict[str, VllmServer]]:
    """Those that the tests of this run ask for, starting side by side: one start takes a core for up to a minute."""
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ExitStack() as stack:
        made = {name: make_vllm(flags=flags) for name, flags in FLAGS.items() if name in asked}
        for server in made.values():
            stack.callback(server.stop)
            server.start()
        yield made


@pytest.fixture(scope="package")
def vllm(servers: dict[str, VllmServer]) -> VllmServer:
    """One server for all tests; each has a service, and adapters, of its own."""
    servers["vllm"].wait_healthy()
    return servers["vllm"]


@pytest.fixture(scope="package")
def second_vllm(servers: dict[str, VllmServer]) -> VllmServer:
    """Another one, whose log-probs mean something else."""
    servers["second_vllm"].wait_healthy()
    return servers["second_vllm"]


def stack_before(server: VllmServer, data_dir: Path, **settings: str) -> LocalStack:
    """Service and worker in front of this server, not started yet: `start("service", "worker")`."""
    environment = {
        "PERENNIAL_ENGINE_URL": server.url,
        "PERENNIAL_DRAIN_SECONDS": "0.5",
        "PERENNIAL_RECONCILE_SECONDS": "0.5",
        **settings,
    }
    return LocalStack(LocalConfig(data_dir, MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=environment))


@contextmanager
def running_before(server: VllmServer, data_dir: Path, **settings: str) -> Iterator[Running]:
    """Service and worker in front of this server, ready, for the length of a `with` block."""
    stack = stack_before(server, data_dir, **settings)
    try:
        stack.start("service", "worker")
        stack.wait_ready()
        with Client(stack.url, stack.api_key) as client:
            yield Running(stack, client)
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def vllm_running(vllm: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Before the shared server; each test makes adapters of its own."""
    with running_before(vllm, tmp_path_factory.mktemp("vllm-stack")) as running:
        yield running


@pytest.fixture
def serve(vllm: VllmServer, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """The service in front of the shared engine, with settings by name."""
    with ExitStack() as stack:

        def start(*parts: str, **settings: str) -> Served:
            local = stack_before(vllm, tmp_path / "data", **{k.upper(): v for k, v in settings.items()})
            stack.callback(local.stop)
            local.start("service", *parts)
            wait_engine(local)
            tenant = Tenant(local.url, local.api_key)
            stack.callback(tenant.close)
            return local, tenant

        yield start


@pytest.fixture(scope="module")
def make_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Front]]:
    made: list[Front] = []

    def make(vllm_url: str) -> Front:
        settings = {"PERENNIAL_ENGINE_URL": vllm_url}
        data = tmp_path_factory.mktemp("front")
        stack = LocalStack(LocalConfig(data, MODEL_DIR, BASE_MODEL, port=0, threads=1, settings=settings))
        stack.start("service")
        wait_engine(stack)
        made.append(Front(vllm_url, stack))
        return made[-1]

    yield make
    for front in made:
        front.close()
        front.stack.stop()
