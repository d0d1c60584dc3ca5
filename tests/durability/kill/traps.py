"""When a fault strikes: the named points of a job's path, as an observer outside of the processes can see them.

An observer rather than a hook in the product: what runs is what is shipped, and a point is where its effect can be seen
on the wire or on the disk, which is where it matters. The wire points are exact, since the exchange waits while the
fault strikes. The two points on the disk are watched for, and the training process is frozen the moment they are seen.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.durability.kill.wire import Seen

POINTS = (
    "after claim", "mid-train", "after temporary write", "after rename", "before commit",
    "commit acknowledgement lost", "after commit", "before load", "after load",
)  # fmt: skip
"""The last two are the two halves of mid-publish: the engine is about to load the version; it has loaded it, and the
alias has not moved."""
WEIGHTS = "/adapter/adapter_model.safetensors"
ON_DISK = ("after temporary write", "after rename")
VICTIMS = ("worker", "trainer", "service", "engine")
ACTIONS = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True)
class Plan:
    point: str
    victim: str
    action: signal.Signals

    def __str__(self) -> str:
        return f"{self.point}: {self.action.name} {self.victim}"


@dataclass
class Trap:
    """Strikes once. `strike` gets the run's id, or None where no run is known; it acts at once."""

    plan: Plan
    strike: Callable[[str | None], None]
    sprung: threading.Event = field(default_factory=threading.Event)
    struck: bool = False
    _first: threading.Lock = field(default_factory=threading.Lock)

    def at(self, point: str, run_id: str | None) -> bool:
        """True when this was the moment."""
        if point != self.plan.point or not self._first.acquire(blocking=False):
            return False
        self.strike(run_id)
        self.struck = True
        self.sprung.set()
        return True


class Watch:
    """Both gates and the watch on the disk; all of them ask the trap that is set at the moment."""

    def __init__(self) -> None:
        self.trap: Trap | None = None

    def worker_gate(self, seen: Seen) -> bool:
        run_id = seen.path.split("/")[-2] if "/runs/" in seen.path else None
        if seen.path.endswith("/leases") and seen.status == 200:
            self._at("after claim", seen.json(answer=True)["run_id"])
        elif seen.path.endswith("/heartbeat") and seen.status is None and seen.json().get("metrics"):
            self._at("mid-train", run_id)
        elif seen.path.endswith("/commit") and seen.status is None:
            self._at("before commit", run_id)
        elif seen.path.endswith("/commit") and seen.status == 200:
            self._at("after commit", run_id)
            return not self._at("commit acknowledgement lost", run_id)
        return True

    def engine_gate(self, seen: Seen) -> bool:
        if seen.path.endswith("/load_lora_adapter"):
            run_id = Path(seen.json()["lora_path"]).parent.name
            if seen.status is None:
                self._at("before load", run_id)
            elif seen.status == 200:
                self._at("after load", run_id)
        return True

    def _at(self, point: str, run_id: str | None) -> bool:
        return self.trap is not None and self.trap.at(point, run_id)

    def look_at_disk(self, root: Path, known: set[str], freeze: Callable[[], None], until: float) -> None:
        """Until the trap has sprung: look for a version that is being written or was just renamed."""
        assert self.trap is not None
        prefix = ".tmp-" if self.trap.plan.point == "after temporary write" else "run_"
        while not self.trap.sprung.is_set() and time.monotonic() < until:
            for adapter in root.iterdir():
                for found in os.scandir(adapter):
                    if (
                        found.name.startswith(prefix)
                        and found.path not in known
                        and os.path.exists(found.path + WEIGHTS)
                    ):
                        freeze()
                        self._at(self.trap.plan.point, found.name.split(".")[-1])
                        return
            time.sleep(0.001)
