"""Names that are never used twice."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """E.g. `job_5f0c...`: 96 random bits, safe in paths, URLs and engine names."""
    return f"{prefix}_{secrets.token_hex(12)}"
