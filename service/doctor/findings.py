"""What a check says, and how it may be set right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something that is not as it has to be."""

    code: str
    """Stable, for programs."""
    subject: str
    """What it is about: an id, a path, a URL."""
    message: str
    """What is wrong, and what a person can do where no repair is safe."""
    repair: Callable[[], object] | None = None
    """Sets it right and looks again before it does: the service may be running."""
    level: Literal["error", "note"] = "error"
    """A note needs nobody and does not count in the exit status."""
