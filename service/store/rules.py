"""What the queue is told by the settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Times in seconds."""

    lease_seconds: float = 30.0
    max_attempts: int = 5
    backoff: float = 5.0
    """Before the second attempt; doubles with each, less some jitter."""
    coalesce_items: int = 16
    """Most items of one training batch made of several feedback batches; 1: each is trained alone."""
    priority_seconds: float = 60.0
    """How much longer an adapter counts as waiting per step of priority."""
    canary_prompt: str | None = None
    files_over_http: bool = False
    """Workers send and fetch versions through the service: they share no directory with it."""
