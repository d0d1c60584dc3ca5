"""The supervisor's side of the training processes beside the first one ("ranks" 1 and up). Imports no torch.

Each has a channel of its own and is told the same as the first. It reports only that it is there and how its part of a
run ended; what a run comes to is the first rank's to say. If one dies, or fails, the others wait for it in vain: the
owner ends them all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.messages import Failed, Followed, Outcome, Progress, Ready, Step, Stop, Stopped, Train, frame, read_event

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


@dataclass
class _Follower:
    rank: int
    process: Process
    writer: asyncio.StreamWriter
    listening: asyncio.Task[None] = field(init=False)


@dataclass
class Followers:
    """Ranks 1 to `size` - 1. `on_answer(run_id, failed or None)` hears how each one's part of a run ends,
    `on_death(rank, exit status)` of each that is gone before `kill`."""

    on_answer: Callable[[str, Failed | None], None]
    on_death: Callable[[int, int], None]
    members: list[_Follower] = field(default_factory=list)
    unwanted: bool = False
    answered: dict[str, int] = field(default_factory=dict)
    """Of the newest run: how many have done their part."""

    async def start(self, argv: Callable[[int, int], Sequence[str]], size: int, environment: Mapping[str, str]) -> None:
        """`argv(rank, channel)`: the command of one rank. `environment` is what the first rank has."""
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *argv(rank, theirs.fileno()), stdin=DEVNULL, stdout=2, pass_fds=(theirs.fileno(),),
                    env=dict(environment) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
                )  # fmt: skip
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            member = _Follower(rank, process, writer)
            self.members.append(member)
            member.listening = asyncio.create_task(self._listen(member, reader))
            log.info("training process of rank %d started pid=%d", rank, process.pid)

    async def send(self, message: Train | Stop) -> None:
        if isinstance(message, Train):
            self.answered = {message.lease.run_id: 0}
        for member in self.members:
            try:
                member.writer.write(frame(message))
                await member.writer.drain()
            except ConnectionError:
                pass  # it died: `_listen` says so

    def done(self, run_id: str) -> bool:
        """Whether each has done its part of the run."""
        return self.answered.get(run_id, 0) >= len(self.members)

    async def kill(self) -> None:
        """End them now and wait until they are gone."""
        self.end()
        await asyncio.gather(*(member.listening for member in self.members))

    def end(self) -> None:
        self.unwanted = True
        for member in self.members:
            if member.process.returncode is None:
                member.process.kill()

    async def _listen(self, member: _Follower, reader: asyncio.StreamReader) -> None:
        try:
            while (event := await read_event(reader)) is not None:
                self._hear(event)
        except ValueError as error:
            log.error("rank %d does not speak the protocol: %s", member.rank, type(error).__name__)
            member.process.kill()
        member.writer.close()
        status = await member.process.wait()
        log.info("training process of rank %d gone pid=%d status=%d", member.rank, member.process.pid, status)
        if not self.unwanted:
            self.on_death(member.rank, status)

    def _hear(self, event: Ready | Progress | Step | Outcome) -> None:
        if isinstance(event, Followed | Failed | Stopped) and event.run_id in self.answered:
            self.answered[event.run_id] += 1
            self.on_answer(event.run_id, event if isinstance(event, Failed) else None)


def meeting_place(size: int, environment: Mapping[str, str]) -> tuple[socket.socket | None, dict[str, str]]:
    """A listening socket for the first rank's store, and torchrun's environment for it; neither for one rank."""
    if size == 1:
        return None, dict(environment)
    listener = socket.create_server((LOOPBACK, 0))
    loop = "lo" if sys.platform == "linux" else "lo0"
    group = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(listener.getsockname()[1]),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loop),
    }  # fmt: skip
    return listener, dict(environment) | group
