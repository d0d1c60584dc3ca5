"""Names under which engines know versions. Never reused: what an engine caches by name stays true for ever."""

from __future__ import annotations

PREFIX = "adp_"
"""Of every adapter id: engines may also hold the base model and adapters that are not ours."""


def served_name(adapter_id: str, n: int) -> str:
    """The engine's name of one version; adapter ids are never used twice."""
    return f"{adapter_id}-v{n}"


def adapter_of(name: str) -> str:
    """The adapter id in a served name."""
    return name.rsplit("-v", 1)[0]
