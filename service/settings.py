"""Every setting of the service, read once: `PERENNIAL_*` from the environment, `PERENNIAL_*_FILE` for secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy import make_url

from service.logprobs_mode import Mode
from service.secret_files import SecretFiles
from service.storage.bucket import check_url
from service.store.rules import Rules
from service.webhooks.guard import Policy

CANARY_PROMPT = "The lighthouse keeper counts 7 gulls, 3 boats and one long cloud. What does she write down tonight?"
"""Any words do, as long as they stay: letters, digits and a question, some of which every adapter changes."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="PERENNIAL_", env_ignore_empty=True, frozen=True)

    data_dir: Path = Path("perennial-data")
    """Holds the database, the adapters, archives and the server's own secrets."""
    database_url: str | None = None
    """SQLAlchemy URL; SQLite in `data_dir` by default."""
    database_password: SecretStr | None = None
    """Put into `database_url`, so that the URL itself is no secret."""
    database_busy_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How long a request waits for a locked database before it is answered with 503."""
    adapters_dir: Path | None = None
    """Version directories; worker and engine see the same directory (at `engine_adapters_dir`)."""
    engine_adapters_dir: Path | None = None
    """Where the engine finds `adapters_dir`, if it is mounted elsewhere there."""
    storage: str | None = None
    """`s3://BUCKET/PREFIX`: versions are kept there, and `adapters_dir` is this host's cache. Credentials, region and
    endpoint come from the usual `AWS_*` variables. None: `adapters_dir` is shared by service, workers and engines."""
    storage_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For one request to the object storage, and for its tries together."""

    model_dir: Path | None = None
    """The base model's directory: its weights' headers say which adapters fit."""
    base_model: str | None = None
    """The name under which the engine serves the base; by default the name of `model_dir`."""
    engine_url: str = "http://127.0.0.1:8701"
    engine_urls: str = ""
    """Several engines of the same base, separated by commas; `engine_url` is the form for one."""
    engine_api_key: SecretStr | None = None
    engine_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of silence after which a generation is given up."""

    engine_logprobs_mode: Mode | None = None
    """What the engine's log-probs mean (vLLM's `--logprobs-mode`); found out by asking it where this is not set."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8700
    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20

    heartbeat_seconds: Annotated[float, Field(gt=0)] = 15.0
    """Most silence of a stream of job events; shorter than what proxies on the way allow."""

    max_requests: Annotated[int, Field(ge=1)] = 2000
    """At once, streams included; more are answered with 429."""
    max_held_bytes: Annotated[int, Field(ge=1024)] = 256 * 2**20
    """Of bodies that are being received or worked on, all together."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Of the disk; below it nothing new is taken, and what was taken goes on."""

    lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    max_attempts: Annotated[int, Field(ge=1)] = 5
    """Failed runs and lost workers alike."""
    retry_backoff: Annotated[float, Field(ge=0)] = 5.0
    """Seconds before the second attempt, less some jitter; doubles with each."""
    coalesce_items: Annotated[int, Field(ge=1, le=1024)] = 16
    """Feedback that waits for one adapter is trained together up to so many items; 1: each batch alone."""
    priority_seconds: Annotated[float, Field(ge=0)] = 60.0
    """What a step of priority is worth, in seconds of waiting."""
    max_queued_jobs: Annotated[int, Field(ge=1)] = 1000
    """Per adapter; more are answered with 429."""
    max_tenant_jobs: Annotated[int, Field(ge=1)] = 20_000
    max_open_jobs: Annotated[int, Field(ge=1)] = 200_000
    """Of all tenants together."""
    max_waiting_items: Annotated[int, Field(ge=1)] = 16_384
    """Feedback items that may wait in one service process for the disk."""
    max_lora_rank: Annotated[int, Field(ge=1)] = 64
    """What the engines were started with (`--max-lora-rank`): adapters of a higher rank are refused at creation."""
    max_adapters: Annotated[int, Field(ge=1)] = 1000
    """Per tenant; more are answered with 429."""
    worker_seen_seconds: Annotated[float, Field(gt=0)] = 45.0
    """A worker that has not called for this long does not count as there."""

    reconcile_seconds: Annotated[float, Field(gt=0)] = 2.0
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long a version that nobody asks for stays loaded."""

    publisher_lease_seconds: Annotated[float, Field(gt=0)] = 6.0
    """Of several service processes one publishes; after its death another does within this time."""
    publish_when: Literal["any", "all"] = "any"
    """Move the alias when one replica that is up holds the new version, or only when all of them do."""
    probe_seconds: Annotated[float, Field(ge=0)] = 10.0
    """An engine that has generated nothing for so long must generate a token before it counts as alive."""

    canary: bool = True
    """Compare every engine's log-probs with the trainer's after loading a version."""
    canary_prompt: Annotated[str, Field(min_length=1, max_length=2000)] = CANARY_PROMPT
    canary_bound_float32: Annotated[float, Field(gt=0)] = 1e-4
    canary_bound_bfloat16: Annotated[float, Field(gt=0)] = 0.5
    """Most that one log-prob may differ, nats, where trainer or engine compute in bfloat16: about twice the largest
    difference that was measured with a real vLLM (`benchmarks/canary_bound.py`). In general a quarter is allowed."""
    engine_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the engines compute in; auto: as the trainer."""

    webhook_hosts: str = ""
    """Hosts that webhooks may go to, separated by commas: `hooks.example.org`, `*.example.org`, `*`. Empty: none."""
    webhook_allow_private: bool = False
    """Private addresses and plain http too."""
    webhook_backoff_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Before the second attempt; four times as much before each further one, up to a day."""
    scrub_at_once: bool = True
    """Write the database's files anew as part of an erasure, so that no byte of it stays: nobody else can write for as
    long. False: `perennial scrub` at a quiet hour."""

    keep_versions: Annotated[int, Field(ge=1)] | None = None
    """Older versions of an adapter lose their files; None keeps all."""
    retention_grace_seconds: Annotated[float, Field(ge=0)] = 3600.0
    """Age below which, and time since its last request for which, a version keeps its files anyway."""
    keep_feedback_days: Annotated[float, Field(gt=0)] | None = None
    """Age at which feedback loses its text, once its jobs have ended; None keeps it."""
    keep_rollouts_days: Annotated[float, Field(gt=0)] | None = None
    """Age at which answers go that no feedback is about; None keeps them."""
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**30
    """Of one file of an adapter that is uploaded; the adapter's own shape sets a closer limit."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls), dotenv_settings, file_secret_settings

    @field_validator("storage")
    @classmethod
    def _usable(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url

    @model_validator(mode="after")
    def _places(self) -> Self:
        data = self.data_dir.absolute()
        adapters = (self.adapters_dir or data / "adapters").absolute()
        filled = {
            "data_dir": data,
            "database_url": self._with_password(self.database_url) or f"sqlite:///{data / 'perennial.db'}",
            "adapters_dir": adapters,
            "engine_adapters_dir": self.engine_adapters_dir or adapters,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # frozen for everyone else
        return self

    def _with_password(self, url: str | None) -> str | None:
        if url is None or self.database_password is None:
            return url
        secret = self.database_password.get_secret_value()
        return make_url(url).set(password=secret).render_as_string(hide_password=False)

    @property
    def adapters_root(self) -> Path:
        assert self.adapters_dir is not None  # noqa: S101 - filled by _places
        return self.adapters_dir

    @property
    def engine_adapters_root(self) -> Path:
        assert self.engine_adapters_dir is not None  # noqa: S101 - filled by _places
        return self.engine_adapters_dir

    @property
    def engines(self) -> list[str]:
        """URL of every replica, in order, each once."""
        return list(dict.fromkeys(u for u in (self.engine_urls or self.engine_url).replace(" ", "").split(",") if u))

    def canary_bound(self, trainer: str) -> float:
        """Most that trainer and engine may differ, by the less exact of the two."""
        exact = "bfloat16" not in (trainer, self.engine_dtype)
        return self.canary_bound_float32 if exact else self.canary_bound_bfloat16

    @property
    def rules(self) -> Rules:
        return Rules(
            lease_seconds=self.lease_seconds,
            max_attempts=self.max_attempts,
            backoff=self.retry_backoff,
            coalesce_items=self.coalesce_items,
            priority_seconds=self.priority_seconds,
            canary_prompt=self.canary_prompt if self.canary else None,
            files_over_http=self.storage is not None,
        )

    @property
    def webhook_policy(self) -> Policy:
        hosts = tuple(h for h in self.webhook_hosts.replace(" ", "").split(",") if h)
        return Policy(hosts, self.webhook_allow_private)

    @property
    def archives_root(self) -> Path:
        return self.data_dir / "archives"

    @property
    def base_name(self) -> str:
        return self.base_model or (self.model_dir.absolute().name if self.model_dir else "")

    @property
    def db_url(self) -> str:
        assert self.database_url is not None  # noqa: S101 - filled by _places
        return self.database_url
