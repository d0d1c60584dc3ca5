"""Which replica answers: the conversation's own, for its cached prefix, unless that one is far busier than the rest.

Rendezvous hashing with bounded loads: a conversation's favourite is the replica with the highest hash of the two, so
that adding or losing one moves only its own share; it is passed over while it holds more than 1.25 times its share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from service.serving.replica import Replica

SLACK = 1.25


def session_key(tenant_id: str, adapter_id: str | None, messages: Sequence[dict[str, Any]]) -> str:
    """The same for every turn of a conversation: its start, up to the first thing that the user said."""
    start: list[dict[str, Any]] = []
    for message in messages:
        start.append(message)
        if message.get("role") == "user":
            break
    text = json.dumps([tenant_id, adapter_id, start], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def choose(replicas: Sequence[Replica], session: str) -> Replica:
    """`replicas` holds at least one. No session: the least loaded."""
    if session:
        share = SLACK * (sum(r.load for r in replicas) + 1) / len(replicas)
        favourite = max(replicas, key=lambda r: _weight(r, session))
        if favourite.load + 1 <= max(share, 1.0):
            return favourite
    return min(replicas, key=lambda r: r.load)


def _weight(replica: Replica, session: str) -> bytes:
    return hashlib.sha256(f"{replica.url} {session}".encode()).digest()
