"""What the routes work with, built once from the settings and handed to `create_app`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx2

from service import admission, ingest
from service.asks import sampling_defaults
from service.bell import Bell
from service.db.engine import Database
from service.engine_client import EngineClient
from service.gathered import Gathered
from service.ingest import Ingest
from service.serving.artifacts import Artifacts
from service.serving.fleet import Fleet
from service.serving.publisher import Publisher
from service.serving.replica import Replica
from service.settings import Settings
from service.storage.base import Storage
from service.storage.choice import open_storage
from service.store.keys import KeyRing, Principal, server_secret
from service.webhooks.sender import Sender


@dataclass(frozen=True)
class Context:
    settings: Settings
    database: Database
    storage: Storage
    serving: Fleet
    publisher: Publisher
    keys: KeyRing
    base_model: str
    """The name under which the engine serves the base."""
    base_shapes: Mapping[str, admission.Shape]
    """(out, in) of the base's weights: what adapters must fit."""
    sampling_defaults: Mapping[str, float]
    """The model's own sampling, for what a request leaves open."""
    work: Bell
    """Rung when a job is queued: workers that wait for one look again."""
    callers: Gathered[str, Principal | None]
    """Whose is this key?"""
    ingest: Ingest
    sender: Sender
    stopping: threading.Event
    """Set when this process is told to end: streams and waiting requests come to an end by themselves."""

    @property
    def engine(self) -> EngineClient:
        """For what any replica can answer, such as the base model's window."""
        return self.serving.engine


def build(settings: Settings, *, transport: httpx2.AsyncBaseTransport | None = None) -> Context:
    """Raises FileNotFoundError when `model_dir` holds no weights, Unavailable for storage that cannot be used.

    `transport` carries the calls to the engine.
    """
    if settings.model_dir is None:
        raise FileNotFoundError("PERENNIAL_MODEL_DIR is not set: the service reads there which adapters fit the base")
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings)
    storage.prepare()
    database = Database(settings.db_url, busy_seconds=settings.database_busy_seconds)
    key = settings.engine_api_key.get_secret_value() if settings.engine_api_key else None
    artifacts = Artifacts(database, storage)
    clients = {
        url: EngineClient(
            url,
            api_key=key,
            timeout=settings.engine_timeout,
            logprobs_mode=settings.engine_logprobs_mode,
            transport=transport,
        )
        for url in settings.engines
    }
    replicas = [Replica(url, client, artifacts, settings, settings.base_name) for url, client in clients.items()]
    serving = Fleet(replicas, settings.base_name)
    ring = KeyRing(server_secret(settings.data_dir / "server.secret"))
    return Context(
        settings=settings,
        database=database,
        storage=storage,
        serving=serving,
        publisher=Publisher(database, serving, storage, settings),
        keys=ring,
        base_model=settings.base_name,
        base_shapes=admission.linear_shapes(settings.model_dir),
        sampling_defaults=sampling_defaults(settings.model_dir),
        work=Bell(),
        callers=_callers(database, ring),
        ingest=ingest.gatherer(database, settings),
        sender=Sender(database, ring, settings.webhook_policy, backoff=settings.webhook_backoff_seconds),
        stopping=threading.Event(),
    )


def _callers(database: Database, ring: KeyRing) -> Gathered[str, Principal | None]:
    def look(keys: Sequence[str]) -> list[Principal | None]:
        with database.read() as s:
            return ring.check_all(s, keys)

    return Gathered("keys", look, most=256, room=10_000)
