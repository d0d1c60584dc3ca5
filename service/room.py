"""Room on the disk. What would add to it is refused while some is left for what must go on: leases, commits,
deletions, and the database's own log."""

from __future__ import annotations

import os

from service.errors import Unavailable
from service.settings import Settings


def check(settings: Settings, more: int = 0) -> None:
    """Raises Unavailable when less than the floor would be left after `more` bytes."""
    for directory in {settings.data_dir, settings.adapters_root}:
        disk = os.statvfs(directory)
        if disk.f_bavail * disk.f_frsize - more < settings.min_free_bytes:
            raise Unavailable(
                "Our disk is nearly full, so nothing new is taken; try again later.", code="disk_full", retry_after=30
            )
