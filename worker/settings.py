"""The worker's settings: flags over environment (`PERENNIAL_WORKER_*`) over defaults. Read here and nowhere else."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AnyHttpUrl, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from api_schemas.base import Identifier, ModelName

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


def _default_worker_id() -> str:
    host = "".join(c if c.isalnum() or c in "._-" else "-" for c in socket.gethostname())
    return f"worker-{host[:80]}-{os.getpid()}"


class WorkerSettings(BaseSettings):
    """Everything a worker process can be told. Times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="PERENNIAL_WORKER_", frozen=True, extra="ignore")

    service_url: AnyHttpUrl
    token: SecretStr | None = None
    """Only by environment: a flag would show in the process list."""
    token_file: Path | None = None
    model: Path
    """Directory of the base model's weights and tokenizer."""
    base_model: ModelName
    """The name by which leases and adapters know the base model."""
    adapters_root: Path
    cache_bytes: Annotated[int, Field(ge=0)] = 10 * 2**30
    """Of versions that are kept under `adapters_root` where they come from the service over HTTP; the longest unused
    goes first."""
    worker_id: Identifier = Field(default_factory=_default_worker_id)
    device: Device = "auto"
    dtype: Dtype = "auto"
    """Of the frozen base weights; auto = float32 on a CPU, bfloat16 on a GPU."""
    quantise: Literal["none", "4bit"] = "none"
    """4bit: the frozen base weights as NF4 through bitsandbytes; needs an NVIDIA GPU."""
    batch_tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 8192
    """Padded tokens of one micro-batch; fewer take less memory. One sample at least."""
    warm_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Of main memory, for adapters with their optimizer state that were trained here of late: their next job reads no
    files. The longest unused goes first; 0: none."""
    compile_layers: bool = False
    """Run the decoder layers through torch.compile: for a GPU that will train much, since each new kind of pass takes
    the first batch that has it a minute or so."""
    leases_at_once: Annotated[int, Field(ge=1, le=64)] = 1
    """Most jobs, of as many adapters, that are leased together: what they need of the frozen base is computed in one
    pass (worker.ahead), then each is trained in turn. None of them is at the service's disposal meanwhile."""
    preflight: Literal["refuse", "off"] = "refuse"
    """Whether a plan that does not fit the free memory ends the worker before it loads anything."""
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Torch threads of the training process; None = torch's own choice."""
    ranks: Annotated[int, Field(ge=1, le=64)] = 1
    """Training processes that share each batch, on this host; with CUDA each takes a GPU of its own."""
    shard: bool = False
    """Spread the frozen base over the ranks (FSDP2) instead of loading it whole on each: for one that does not fit."""
    poll_seconds: Annotated[float, Field(ge=0.1, le=30)] = 2.0
    """How long one lease request waits for work. A shutdown waits for it, so that no granted lease is orphaned."""
    stop_grace_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How long the training process may take to stop between two steps before it is killed."""
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """A training process that has said nothing for this long is taken for stuck: its job fails and may be retried."""
    outage_patience_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How long past its lease a run goes on while the service does not answer. Only the service's token check decides
    who may commit, so patience costs work at most, never correctness."""

    @model_validator(mode="after")
    def _ranks_have_places(self) -> WorkerSettings:
        if self.shard and self.ranks == 1:
            raise ValueError("shard spreads the base over several ranks: set ranks to 2 or more")
        if self.ranks > 1 and self.leases_at_once > 1:
            raise ValueError("several ranks share one lease: set leases_at_once to 1, or ranks to 1")
        if self.shard and self.quantise != "none":
            raise ValueError("shard and quantise do not go together: set one of the two")
        return self

    @model_validator(mode="after")
    def _one_token(self) -> WorkerSettings:
        if (self.token is None) == (self.token_file is None):
            raise ValueError("give the worker token by --token-file or by PERENNIAL_WORKER_TOKEN, one of the two")
        return self

    def read_token(self) -> str:
        """The bearer token. Raises OSError for an unreadable file and ValueError for an empty one."""
        text = self.token.get_secret_value() if self.token else self._token_path().read_text(encoding="utf-8")
        if not (token := text.strip()):
            raise ValueError("the worker token is empty")
        return token

    def _token_path(self) -> Path:
        assert self.token_file is not None  # noqa: S101 - `_one_token` holds it
        return self.token_file


def parser() -> argparse.ArgumentParser:
    """Flags of `python -m worker`. A flag that is not given leaves the environment's value in place."""
    flags = argparse.ArgumentParser(prog="python -m worker", argument_default=argparse.SUPPRESS)
    flags.add_argument("--service-url", help="where the service listens, e.g. http://127.0.0.1:8000")
    flags.add_argument("--token-file", help="file with the worker token (or set PERENNIAL_WORKER_TOKEN)")
    flags.add_argument("--model", help="directory of the base model")
    flags.add_argument("--base-model", help="the base model's name, as adapters know it")
    flags.add_argument("--adapters-root", help="directory that adapter versions are written to")
    flags.add_argument("--worker-id")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"])
    flags.add_argument("--dtype", choices=["auto", "float32", "bfloat16"])
    flags.add_argument("--quantise", choices=["none", "4bit"], help="4bit needs an NVIDIA GPU and bitsandbytes")
    flags.add_argument("--batch-tokens", type=int, help="padded tokens of one micro-batch: fewer take less memory")
    flags.add_argument("--warm-bytes", type=int, help="memory for adapters trained of late: 0 keeps none")
    flags.add_argument("--compile-layers", action="store_true", help="decoder layers through torch.compile")
    flags.add_argument("--leases-at-once", type=int, help="jobs of as many adapters that share the base's passes")
    flags.add_argument("--preflight", choices=["refuse", "off"], help="off: start even if the plan does not fit")
    flags.add_argument("--threads", type=int, help="torch threads of the training process")
    flags.add_argument("--ranks", type=int, help="training processes that share each batch, one GPU each")
    flags.add_argument("--shard", action="store_true", help="spread the base model over the ranks (FSDP2)")
    return flags


def from_flags(arguments: Sequence[str]) -> WorkerSettings:
    """Settings of one process. Raises pydantic.ValidationError; exits with usage on an unknown flag."""
    return WorkerSettings(**vars(parser().parse_args(arguments)))
