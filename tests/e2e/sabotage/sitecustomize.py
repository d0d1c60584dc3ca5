"""Python imports this first, where PYTHONPATH names its directory: a worker whose clock and whose disk are wrong.

SABOTAGE_CLOCK: seconds that its clock is ahead. SABOTAGE_DISK: while this file exists, syncing what a version is made
of fails as on a full disk, which is where a file system that allocates late says so. Other processes are left alone.
"""

from __future__ import annotations

import errno
import os
import sys
import time

if {"worker", "worker.child"} & set(sys.orig_argv):
    ahead, full = float(os.environ["SABOTAGE_CLOCK"]), os.environ["SABOTAGE_DISK"]
    right, right_ns, sync = time.time, time.time_ns, os.fsync
    time.time = lambda: right() + ahead
    time.time_ns = lambda: right_ns() + int(ahead * 1e9)

    def failing(descriptor: int) -> None:
        if os.path.exists(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = failing
