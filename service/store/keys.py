"""API keys: `pk_<public id>_<secret>_<checksum>`; only a keyed digest of the whole is stored."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from service.db.engine import clock, db_now
from service.db.glance import Glance, plain
from service.db.tables import ApiKey, Tenant
from service.errors import BadRequest, NotFound
from service.store.ids import new_id

CLIENT_SCOPES = frozenset({"chat", "feedback:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write"})
WORKER_SCOPES = frozenset({"worker"})
DEFAULT_TENANT = "default"
_SHAPE = re.compile(r"pk_([0-9a-f]{16})_([0-9a-f]{64})_([0-9a-f]{8})")

_KEYS = ApiKey.__table__.c
_STANDING = select(_KEYS.id, _KEYS.digest, _KEYS.tenant_id, _KEYS.scopes).where(
    _KEYS.revoked_at.is_(None),
    or_(_KEYS.expires_at.is_(None), _KEYS.expires_at > db_now()),
)
_VALID = _STANDING.where(_KEYS.id.in_(bindparam("ids")))
"""Built once: every request pays for it."""
_VALID_SQL = plain(_STANDING.where(_KEYS.id == bindparam("id")))


@dataclass(frozen=True)
class Principal:
    """Who is calling."""

    key_id: str
    tenant_id: str | None
    scopes: frozenset[str]


def server_secret(path: Path, sync: Callable[[int], None] = os.fsync) -> bytes:
    """The pepper of the key digests: 32 bytes, made at first use, readable by the owner alone.

    On disk before any key is made with it: without it no key is good any more. `sync` makes an open file or directory
    durable.
    """
    if not path.exists():
        _make_secret(path, sync)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        sync(directory)  # also when it was there: who made it may have been killed before this line
    finally:
        os.close(directory)
    secret = bytes.fromhex(path.read_text().strip())
    if len(secret) != 32:
        raise ValueError(f"{path} does not hold a secret of 32 bytes")
    return secret


def _make_secret(path: Path, sync: Callable[[int], None]) -> None:
    """Written aside, then linked: nobody reads half a secret, and of two makers at once one wins."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        sync(file.fileno())
    with suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()


class KeyRing:
    """Makes and checks keys. Digest: HMAC-SHA256 of the whole key under the server's secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def digest(self, key: str) -> str:
        return hmac.digest(self._secret, key.encode(), "sha256").hex()

    def pseudonym(self, tenant_id: str, user: str) -> str:
        """What is kept of a caller's `user`: always the same for the same, and no way back to it without the secret."""
        return self.digest(f"user\0{tenant_id}\0{user}")

    def create(
        self, s: Session, *, tenant: str | None, name: str, scopes: Iterable[str], expires_in: float | None = None
    ) -> str:
        """Store a new key and return it: the only time that it is seen. `tenant` is a name; None for workers."""
        wanted = frozenset(scopes)
        if unknown := wanted - CLIENT_SCOPES - WORKER_SCOPES:
            raise BadRequest(f"Unknown scopes: {', '.join(sorted(unknown))}.", param="scopes")
        if not wanted or (tenant is None) != (wanted == WORKER_SCOPES) or (tenant and "worker" in wanted):
            # A tenant's key that may lease would read every other tenant's feedback.
            raise BadRequest("A key is either a tenant's with client scopes, or a worker's.", param="scopes")
        public, now = secrets.token_hex(8), clock(s)
        body = f"pk_{public}_{secrets.token_hex(32)}"
        key = f"{body}_{zlib.crc32(body.encode()):08x}"
        s.add(
            ApiKey(
                id=public,
                tenant_id=tenant_id(s, tenant) if tenant is not None else None,
                name=name,
                scopes=sorted(wanted),
                digest=self.digest(key),
                created_at=now,
                expires_at=now + expires_in if expires_in is not None else None,
            )
        )
        return key

    def check(self, s: Session, key: str) -> Principal | None:
        """The key's owner, or None: malformed, unknown, expired and revoked keys look alike."""
        return self.check_all(s, [key])[0]

    def check_all(self, s: Session, keys: Sequence[str]) -> list[Principal | None]:
        """As `check` for each, with one look at the database. Nothing is remembered: a revoked key ends at once."""
        ids = {match[1] for key in keys if (match := _SHAPE.fullmatch(key))}
        rows = {r.id: r._asdict() for r in s.execute(_VALID, {"ids": sorted(ids)})} if ids else {}
        return [self._owner(key, rows) for key in keys]

    def glance(self, glance: Glance, key: str) -> Principal | None:
        """As `check`, on the event loop. Raises NotNow."""
        match = _SHAPE.fullmatch(key)
        found = glance.rows(_VALID_SQL, {"id": match[1]}) if match else []
        return self._owner(key, {row["id"]: row | {"scopes": orjson.loads(row["scopes"])} for row in found})

    def _owner(self, key: str, rows: Mapping[str, Mapping[str, Any]]) -> Principal | None:
        match = _SHAPE.fullmatch(key)
        row = rows.get(match[1]) if match else None
        known = row["digest"] if row is not None else "0" * 64
        if not hmac.compare_digest(known, self.digest(key)) or row is None:
            return None
        return Principal(row["id"], row["tenant_id"], frozenset(row["scopes"]))


def tenant_id(s: Session, name: str) -> str:
    """The tenant's id; made at first use."""
    found = s.scalar(select(Tenant.id).where(Tenant.name == name))
    if found is not None:
        return found
    tenant = Tenant(id=new_id("ten"), name=name, created_at=clock(s))
    s.add(tenant)
    s.flush()
    return tenant.id


def public_id(given: str) -> str:
    """Of a key: as it is, behind `pk_`, or in the whole key."""
    return given.strip().removeprefix("pk_").partition("_")[0]


def revoke(s: Session, public_id: str) -> None:
    row = s.get(ApiKey, public_id)
    if row is None:
        raise NotFound("No such key.", code="key_not_found")
    row.revoked_at = clock(s)


def listing(s: Session) -> list[tuple[ApiKey, str | None]]:
    """Every key with its tenant's name."""
    rows = s.execute(
        select(ApiKey, Tenant.name).outerjoin(Tenant, ApiKey.tenant_id == Tenant.id).order_by(ApiKey.created_at)
    )
    return [(key, name) for key, name in rows]
