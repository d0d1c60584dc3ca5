"""A job's events as a stream: what has happened so far, then what happens, until it has ended.

The truth is the database's outbox and steps: a stream that breaks off is taken up anywhere, through any process of the
service, from the id that the client saw last. An id is `n` or `n-step`: the adapter's event that was sent last, and the
last step of the run that it began. Between two looks nothing of the database is held, however slowly a client reads.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import anyio
from sqlalchemy import select
from sqlalchemy.orm import Session

import api_schemas.events as wire
from api_schemas.jobs import JobProgress, StepMetrics
from service.db.tables import Event, Job, Run, Step
from service.sse import event as event_bytes
from service.store import events, transitions

if TYPE_CHECKING:
    from service.context import Context

Item = wire.Event | wire.JobStep
LOOK_SECONDS = 0.5
"""How often a stream looks for news. No bell: most news come from other processes, and many streams may be open."""
AT_ONCE = 200
"""Most events, and most steps, of one look."""
POSITION = r"^[0-9]{1,10}(-[0-9]{1,10})?$"


class Position(NamedTuple):
    """Where a stream is: everything up to here was sent."""

    n: int = 0
    step: int = 0

    @classmethod
    def parse(cls, last_event_id: str | None) -> Position:
        """Raises ValueError for what does not match POSITION."""
        if last_event_id is None:
            return cls()
        if not re.fullmatch(POSITION, last_event_id):
            raise ValueError("not an id of ours")
        n, _, step = last_event_id.partition("-")
        return cls(int(n), int(step or 0))

    def __str__(self) -> str:
        return f"{self.n}-{self.step}" if self.step else str(self.n)


@dataclass(frozen=True)
class News:
    """What one look found, in order, each with the position that it leads to."""

    items: list[tuple[Position, Item]]
    phase: wire.JobPhase | None
    ended: bool
    """The job has ended, and nothing is left to send."""


def look(s: Session, job_id: str, after: Position) -> News:
    """What happened to the job after this position."""
    job = s.get_one(Job, job_id)  # first: once it says that the job has ended, the events that are read next say how
    over = job.state not in transitions.OPEN
    items = list(islice(_timeline(s, job, after), AT_ONCE))
    run = s.get(Run, job.run_id) if job.state == "running" and job.run_id is not None else None
    phase = None
    if run is not None and run.progress:
        phase = wire.JobPhase(job_id=job_id, run_id=run.id, progress=JobProgress.model_validate(run.progress))
    return News(items, phase, ended=over and len(items) < AT_ONCE)


def _timeline(s: Session, job: Job, after: Position) -> Iterator[tuple[Position, Item]]:
    """Events in order; the steps of a run follow the event that began it."""
    found = events.since(s, job.adapter_id, after.n, job_id=job.id, limit=AT_ONCE)  # before the steps: none is missed
    if after.n and (last := s.get(Event, (job.adapter_id, after.n))) is not None and last.job_id == job.id:
        yield from _steps(s, last, after.step)
    for event in found:
        yield Position(event.n), view(event)
        yield from _steps(s, event, 0)


def _steps(s: Session, began: Event, after: int) -> Iterator[tuple[Position, Item]]:
    if began.type != "job.running" or began.job_id is None:
        return
    run_id = began.data["run_id"]
    query = select(Step).where(Step.run_id == run_id, Step.step > after).order_by(Step.step).limit(AT_ONCE)
    for step in s.scalars(query):
        metrics = StepMetrics.model_validate(step.metrics)
        yield Position(began.n, step.step), wire.JobStep(job_id=began.job_id, run_id=run_id, metrics=metrics)


def view(row: Event) -> wire.Event:
    return wire.Event(
        type=row.type,
        adapter_id=row.adapter_id,
        job_id=row.job_id,
        version=row.version_n,
        data=row.data,
        created_at=int(row.created_at),
    )


async def stream(context: Context, job_id: str, after: Position) -> AsyncGenerator[bytes]:
    """The events in the protocol's own form; ends with the job, or when this process is about to stop."""
    at, phase, spoken = after, None, time.monotonic()
    yield b"retry: 2000\n\n"
    while not context.stopping.is_set():
        news = await anyio.to_thread.run_sync(_looked, context, job_id, at)
        said: list[tuple[bytes, Item | wire.JobPhase]] = [
            (f"id: {position}\n".encode(), item) for position, item in news.items
        ]
        if news.phase is not None and news.phase != phase:
            said.append((b"", news.phase))
        for prefix, item in said:
            yield prefix + event_bytes(item.model_dump(exclude_none=True), item.type)
        if news.ended:
            return
        at, phase = news.items[-1][0] if news.items else at, news.phase
        if said:
            spoken = time.monotonic()
        elif time.monotonic() - spoken > context.settings.heartbeat_seconds:
            yield b": still there\n\n"
            spoken = time.monotonic()
        await asyncio.sleep(LOOK_SECONDS)


def _looked(context: Context, job_id: str, after: Position) -> News:
    with context.database.read() as s:
        return look(s, job_id, after)
