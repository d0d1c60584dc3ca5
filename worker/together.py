"""Several leases at once in the training process: what they need of the frozen base, in one pass."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sdpo_core.path_choice import release_memory
from worker.ahead import Ahead, ahead_of, draft_of
from worker.base_model import BaseModel
from worker.errors import StoppedError
from worker.messages import Progress, Train

T = TypeVar("T")
log = logging.getLogger(__name__)
GATHER_SECONDS = 0.1
"""How long the next lease of a round may be behind the one before it."""


class Task(Protocol):
    """One lease to work on."""

    @property
    def train(self) -> Train: ...

    @property
    def stop(self) -> threading.Event: ...


def gathered(tasks: queue.SimpleQueue[T], most: int) -> list[T]:
    """The next task, and those that come right behind it."""
    found = [tasks.get()]
    while len(found) < most:
        try:
            found.append(tasks.get(timeout=GATHER_SECONDS))
        except queue.Empty:
            break
    return found


def shared_ahead(tasks: Sequence[Task], base: BaseModel, tell: Callable[[Progress], None]) -> dict[str, Ahead]:
    """By run, of those that can share. Where it fails, none: each job then meets alone what is wrong with it, and
    reports it; the others go on."""
    able = [t for t in tasks if t.train.lease.kind == "train" and t.train.lease.base_model == base.name]
    if len(able) < 2:
        return {}
    try:
        drafts = [draft_of(t.train.lease, base) for t in able]
        found = ahead_of(drafts, base, tell, lambda: all(t.stop.is_set() for t in able))
    except StoppedError:
        return {}
    except Exception as error:  # of whichever kind: nothing was written and nothing moved
        log.warning("%d leases cannot share a pass (%s): each is done alone", len(able), type(error).__name__)
        found = []
    if not found:
        release_memory()
    return {t.train.lease.run_id: ahead for t, ahead in zip(able, found, strict=False)}
