"""The training process: `python -m worker.child`, started by worker/trainer_process.py and by nobody else.

It loads the base model once, then works on one lease at a time. It has no URL and no token. It dies with its
supervisor: by signal where the kernel offers that (Linux), and everywhere when its end of the socket closes.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from worker.errors import StoppedError, TrainingFailedError
from worker.messages import Failed, Outcome, Progress, Ready, Step, Stopped, Train, frame, read_command

if TYPE_CHECKING:
    from worker.ahead import Ahead
    from worker.base_model import BaseModel

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """One lease to work on; `stop` is set when the supervisor wants it to end before the next step."""

    train: Train
    stop: threading.Event = field(default_factory=threading.Event)


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent dies. Exits at once if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def listen(stream: BinaryIO, tasks: queue.SimpleQueue[Task]) -> None:
    """Take commands until the supervisor is gone, then end the whole process, training or not."""
    held: weakref.WeakValueDictionary[str, Task] = weakref.WeakValueDictionary()
    try:
        while (command := read_command(stream)) is not None:
            if isinstance(command, Train):
                task = held[command.lease.run_id] = Task(command)
                tasks.put(task)
            elif (wanted := held.get(command.run_id)) is not None:
                wanted.stop.set()
    except (EOFError, OSError, ValueError) as error:
        log.error("the supervisor's commands cannot be read: %s", type(error).__name__)
    os._exit(0)


class Channel:
    """Events to the supervisor. Only the main thread writes."""

    def __init__(self, channel: socket.socket) -> None:
        self._socket = channel

    def send(self, event: Ready | Progress | Step | Outcome) -> None:
        self._socket.sendall(frame(event))


def run_task(task: Task, base: BaseModel, root: Path, channel: Channel, ahead: Ahead | None = None) -> Outcome:
    """One lease to its outcome; `ahead`: what was computed for it together with others.

    Unforeseen errors are reported by type alone: their text may quote what users wrote.
    """
    from sdpo_core.ranks import RankLost
    from worker.job import run_job, run_preview
    from worker.ranks import gone

    lease = task.train.lease
    if task.stop.is_set() and base.ranks.size == 1:  # while others were worked on; ranks stop together or not at all
        return Stopped(run_id=lease.run_id)
    report = channel.send if base.ranks.rank == 0 else _unheard
    try:
        if lease.kind == "preview":
            return run_preview(lease, base, root, report=report)
        return run_job(lease, base, root, report=report, should_stop=task.stop.is_set, ahead=ahead)
    except StoppedError:
        return Stopped(run_id=lease.run_id)
    except TrainingFailedError as error:
        return Failed(run_id=lease.run_id, code=error.code, message=str(error), retryable=error.retryable)
    except RankLost:
        gone()
    except Exception as error:
        return unforeseen(lease.run_id, error)


def _unheard(_: Progress | Step) -> None:
    """Steps are the first rank's to report."""


def unforeseen(run_id: str, error: Exception) -> Failed:
    """What the service hears of an error that nobody planned for: its type and place, never its text."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "nowhere"
    message = f"{type(error).__name__} at {where}"
    log.error("run %s: %s\n%s", run_id, message, "".join(traceback.format_tb(error.__traceback__)))
    return Failed(run_id=run_id, code="internal_error", message=message, retryable=True, poisoned=True)


def serve(arguments: argparse.Namespace, channel_socket: socket.socket) -> None:
    """Load the base model, say so, then work until the supervisor is gone."""
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(channel_socket.makefile("rb"), tasks), daemon=True).start()
    import torch
    from transformers.utils.logging import disable_progress_bar

    from worker.base_model import load_base
    from worker.ranks import entered
    from worker.together import gathered, shared_ahead
    from worker.warm import WarmVersions

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    disable_progress_bar()
    ranks = entered(arguments.ranks, arguments.store_fd, arguments.device, shard=arguments.shard)
    base = load_base(
        arguments.model, arguments.base_model, arguments.device, arguments.dtype, arguments.quantise, ranks
    )
    ranks.gathered(None)  # ready when all are
    base = replace(
        base, batch_tokens=arguments.batch_tokens, compile_layers=arguments.compile_layers,
        warm=WarmVersions(arguments.warm_bytes),
    )  # fmt: skip
    channel = Channel(channel_socket)
    parameters = sum(p.numel() for p in base.module.parameters())
    channel.send(Ready(parameters=parameters, device=str(base.device)))
    while True:
        together = gathered(tasks, arguments.leases_at_once)
        ahead = shared_ahead(together, base, channel.send)
        while together:
            task = together.pop(0)
            known = ahead.pop(task.train.lease.run_id, None)
            channel.send(run_task(task, base, arguments.adapters_root, channel, known))


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m worker.child")
    flags.add_argument("--channel-fd", type=int, required=True)
    flags.add_argument("--parent-pid", type=int, required=True)
    flags.add_argument("--model", type=Path, required=True)
    flags.add_argument("--base-model", required=True)
    flags.add_argument("--adapters-root", type=Path, required=True)
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], required=True)
    flags.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], required=True)
    flags.add_argument("--quantise", choices=["none", "4bit"], default="none")
    flags.add_argument("--batch-tokens", type=int, default=8192)
    flags.add_argument("--warm-bytes", type=int, default=0)
    flags.add_argument("--leases-at-once", type=int, default=1)
    flags.add_argument("--threads", type=int)
    flags.add_argument("--ranks", type=int, default=1)
    flags.add_argument("--store-fd", type=int)
    flags.add_argument("--shard", action="store_true")
    flags.add_argument("--compile-layers", action="store_true")
    arguments = flags.parse_args()
    die_with(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    with socket.socket(fileno=arguments.channel_fd) as channel:
        serve(arguments, channel)


if __name__ == "__main__":
    main()
