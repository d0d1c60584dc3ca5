"""Standard Webhooks 1.0 (https://github.com/standard-webhooks/standard-webhooks): how a delivery is signed.

Nothing secret is stored: an endpoint's secret is derived from the server's own, the endpoint's id and a generation.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable

from service.store.keys import KeyRing

PREFIX = "whsec_"


def secret_of(ring: KeyRing, webhook_id: str, generation: int) -> str:
    """`whsec_` and 32 bytes in base64; another for each generation of each endpoint."""
    raw = bytes.fromhex(ring.digest(f"webhook\0{webhook_id}\0{generation}"))
    return PREFIX + base64.b64encode(raw).decode()


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the HMAC-SHA256 of id, time and body, in base64."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def headers(secrets: Iterable[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """One signature per secret: after a rotation the old one goes on for a while."""
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(s, message_id, timestamp, body) for s in secrets),
    }
