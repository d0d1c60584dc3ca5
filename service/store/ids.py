"""Names that are never used twice."""

from __future__ import annotations

import os
import time


def new_id(prefix: str) -> str:
    """E.g. `job_6a17...`: 40 bits of time, in 1/256 s, then 56 random ones; safe in paths, URLs and engine names.

    The time is there for the database: what is written together lies together, in one page of an index instead of one
    for each row. Nothing may be read from it, and nothing depends on the clock.
    """
    return f"{prefix}_{int(time.time() * 256):010x}{os.urandom(7).hex()}"
