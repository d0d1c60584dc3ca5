"""What supervisor and training process say to each other, over a pair of pipes of their own.

Frames, not lines on stdout: a library that prints cannot corrupt the protocol, and a torn frame is seen as the end of
the stream. A frame is a 4-byte big-endian length followed by that many bytes of JSON.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from api_schemas.jobs import StepMetrics
from api_schemas.preview import Preview
from api_schemas.worker import Canary, FileEntry, ItemReport, Lease

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 30


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Train(_Message):
    """Supervisor: do this lease."""

    type: Literal["train"] = "train"
    lease: Lease


class Stop(_Message):
    """Supervisor: stop before the next step. Means nothing when no lease is being worked on."""

    type: Literal["stop"] = "stop"
    run_id: str


class Ready(_Message):
    """Trainer: the base model is resident."""

    type: Literal["ready"] = "ready"
    parameters: int
    device: str


class Progress(_Message):
    type: Literal["progress"] = "progress"
    run_id: str
    phase: str
    step: int = 0
    steps: int = 0


class Step(_Message):
    type: Literal["step"] = "step"
    run_id: str
    metrics: StepMetrics


class Done(_Message):
    """Trainer: the version is on disk under its final name, synced; all that is left is to commit it."""

    type: Literal["done"] = "done"
    run_id: str
    uri: str
    files: list[FileEntry]
    standing_feedback: list[str]
    items: list[ItemReport]
    training_seconds: float
    canary: Canary | None = None


class Previewed(_Message):
    """Trainer: what the lease's batch would teach; nothing was written."""

    type: Literal["previewed"] = "previewed"
    run_id: str
    preview: Preview


class Followed(_Message):
    """Trainer, a rank other than the first: its part of the run is done."""

    type: Literal["followed"] = "followed"
    run_id: str


class Failed(_Message):
    type: Literal["failed"] = "failed"
    run_id: str
    code: str
    message: str
    retryable: bool
    poisoned: bool = False
    """True: the process may be in an unknown state and has to be replaced."""


class Stopped(_Message):
    type: Literal["stopped"] = "stopped"
    run_id: str


Command = Annotated[Train | Stop, Field(discriminator="type")]
Outcome = Done | Previewed | Failed | Stopped | Followed
Event = Annotated[Ready | Progress | Step | Outcome, Field(discriminator="type")]
_COMMAND: TypeAdapter[Train | Stop] = TypeAdapter(Command)
_EVENT: TypeAdapter[Ready | Progress | Step | Outcome] = TypeAdapter(Event)


def frame(message: _Message) -> bytes:
    """The bytes of one message, length first."""
    body = message.model_dump_json().encode()
    return _LENGTH.pack(len(body)) + body


def _length(header: bytes) -> int:
    size: int = _LENGTH.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes: the stream is out of step")
    return size


def read_command(stream: BinaryIO) -> Train | Stop | None:
    """The next command of a blocking, buffered stream; None at its end.

    Raises EOFError for a torn frame and ValueError for one that is no command.
    """
    header = stream.read(_LENGTH.size)
    if not header:
        return None
    if len(header) < _LENGTH.size:
        raise EOFError("the command stream ended inside a frame")
    body = stream.read(size := _length(header))
    if len(body) < size:
        raise EOFError("the command stream ended inside a frame")
    return _COMMAND.validate_json(body)


async def read_event(stream: asyncio.StreamReader) -> Ready | Progress | Step | Outcome | None:
    """The next event; None once the trainer is gone, also when it died inside a frame.

    Raises ValueError for a frame that is no event.
    """
    try:
        header = await stream.readexactly(_LENGTH.size)
        return _EVENT.validate_json(await stream.readexactly(_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
