"""Every setting of the service, read once: `PERENNIAL_*` from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.logprobs_mode import Mode


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="PERENNIAL_", env_ignore_empty=True, frozen=True)

    data_dir: Path = Path("perennial-data")
    """Holds the database, the adapters, archives and the server's own secrets."""
    database_url: str | None = None
    """SQLAlchemy URL; SQLite in `data_dir` by default."""
    database_busy_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How long a request waits for a locked database before it is answered with 503."""
    adapters_dir: Path | None = None
    """Version directories; worker and engine see the same directory (at `engine_adapters_dir`)."""
    engine_adapters_dir: Path | None = None
    """Where the engine finds `adapters_dir`, if it is mounted elsewhere there."""

    model_dir: Path | None = None
    """The base model's directory: its weights' headers say which adapters fit."""
    base_model: str | None = None
    """The name under which the engine serves the base; by default the name of `model_dir`."""
    engine_url: str = "http://127.0.0.1:8701"
    engine_api_key: SecretStr | None = None
    engine_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of silence after which a generation is given up."""

    engine_logprobs_mode: Mode | None = None
    """What the engine's log-probs mean (vLLM's `--logprobs-mode`); found out by asking it where this is not set."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8700
    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20

    lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    max_attempts: Annotated[int, Field(ge=1)] = 3
    retry_backoff: Annotated[float, Field(ge=0)] = 5.0
    """Seconds before the second attempt; doubles with each."""
    max_queued_jobs: Annotated[int, Field(ge=1)] = 1000
    """Per adapter; more are answered with 429."""
    max_adapters: Annotated[int, Field(ge=1)] = 1000
    """Per tenant; more are answered with 429."""
    worker_seen_seconds: Annotated[float, Field(gt=0)] = 45.0
    """A worker that has not called for this long does not count as there."""

    reconcile_seconds: Annotated[float, Field(gt=0)] = 2.0
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long a version that nobody asks for stays loaded."""

    @model_validator(mode="after")
    def _places(self) -> Self:
        data = self.data_dir.absolute()
        adapters = (self.adapters_dir or data / "adapters").absolute()
        filled = {
            "data_dir": data,
            "database_url": self.database_url or f"sqlite:///{data / 'perennial.db'}",
            "adapters_dir": adapters,
            "engine_adapters_dir": self.engine_adapters_dir or adapters,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # frozen for everyone else
        return self

    @property
    def adapters_root(self) -> Path:
        assert self.adapters_dir is not None  # noqa: S101 - filled by _places
        return self.adapters_dir

    @property
    def engine_adapters_root(self) -> Path:
        assert self.engine_adapters_dir is not None  # noqa: S101 - filled by _places
        return self.engine_adapters_dir

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
