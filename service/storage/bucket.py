"""An S3-compatible bucket through obstore: a few blocking calls, with its errors as ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from service.errors import Unavailable

PIECE = 8 * 2**20
"""Bytes of one request: each is bounded in time and tried again alone."""


class WrongUrl(ValueError):
    """`PERENNIAL_STORAGE` or the endpoint cannot be used; the message says why and quotes neither."""


class Bucket:
    """One prefix of one bucket. Keys are relative to it.

    Every call raises Unavailable when the storage does not answer or refuses us, FileNotFoundError for an absent key
    (and, as S3 tells it the same way, for an absent bucket).
    """

    def __init__(self, url: str, *, seconds: float = 30.0) -> None:
        """`seconds`: for one request, and for its tries together. Credentials, region and endpoint are read from the
        usual `AWS_*` variables. Raises WrongUrl."""
        check_url(url)
        self.url = url.rstrip("/")
        limit = timedelta(seconds=seconds)
        try:
            self._store = S3Store.from_url(
                self.url,
                client_options={
                    # Who names an endpoint without TLS means it; without one, obstore knows only AWS's own, with TLS.
                    "allow_http": True,
                    "connect_timeout": timedelta(seconds=min(5.0, seconds)),
                    "timeout": limit,
                },
                retry_config={"max_retries": 3, "retry_timeout": limit},
            )
        except BaseError as error:
            raise WrongUrl("PERENNIAL_STORAGE has to be s3://BUCKET/PREFIX") from error

    def put(self, key: str, path: Path) -> None:
        """Atomic, also where it is sent in parts."""
        with _ours():
            obstore.put(self._store, key, path)

    def create(self, key: str, body: bytes) -> bool:
        """Unless the key is there: whether it was not."""
        with _ours():
            try:
                obstore.put(self._store, key, body, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def read(self, key: str) -> bytes:
        with _ours():
            return bytes(obstore.get(self._store, key).bytes())

    def pieces(self, key: str, size: int) -> Iterator[bytes]:
        """Its first `size` bytes, or all if it has fewer."""
        if not size:
            return
        with _ours():
            first = obstore.get(self._store, key, options={"range": (0, min(size, PIECE))})
            size = min(size, int(first.meta["size"]))
            yield bytes(first.bytes())
            for start in range(PIECE, size, PIECE):
                yield bytes(obstore.get_range(self._store, key, start=start, end=min(size, start + PIECE)))

    def has(self, key: str) -> bool:
        with _ours():
            try:
                obstore.head(self._store, key)
            except FileNotFoundError:
                return False
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Absent ones are fine."""
        with _ours():
            for key in keys:  # one by one: not every S3 of others knows how to delete many
                obstore.delete(self._store, key)

    def written(self, prefix: str) -> dict[str, float]:
        """Every key below -> when it was written, Unix seconds."""
        with _ours():
            pages = obstore.list(self._store, prefix)
            return {str(m["path"]): m["last_modified"].timestamp() for page in pages for m in page}

    def folders(self, prefix: str = "") -> list[str]:
        """Names one level below a prefix that have keys below them, sorted."""
        with _ours():
            found: Any = obstore.list_with_delimiter(self._store, prefix or None)
            return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in found["common_prefixes"])

    def claim(self, key: str, owner: str) -> None:
        """Make sure that this prefix is ours, at start: two installations in one would take each other's files for
        garbage. Raises Unavailable with what to change."""
        try:
            if self.create(key, json.dumps({"owner": owner}).encode()) or self.owner(key) == owner:
                return
        except FileNotFoundError as error:
            raise Unavailable(f"{self.url}: there is no such bucket.", code="storage_unavailable") from error
        except Unavailable as error:
            raise Unavailable(f"{self.url}: {_reason(error.__cause__)}", code="storage_unavailable") from error
        raise Unavailable(
            f"{self.url} belongs to another installation (another server.secret): choose another prefix.",
            code="storage_taken",
        )

    def owner(self, key: str) -> str | None:
        """Whose it is; None when that cannot be read. Raises FileNotFoundError."""
        try:
            found = json.loads(self.read(key))
        except ValueError:
            return None
        return str(found["owner"]) if isinstance(found, dict) and "owner" in found else None


def check_url(url: str) -> None:
    """Raises WrongUrl; also for an endpoint that obstore could not even read."""
    parts, endpoint = urlsplit(url), os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise WrongUrl("it has to be s3://BUCKET/PREFIX, without keys: those go into AWS_ACCESS_KEY_ID and its like")
    host = urlsplit(endpoint)
    if endpoint and (host.scheme not in ("http", "https") or not host.netloc or "@" in host.netloc):
        raise WrongUrl("AWS_ENDPOINT_URL has to be http(s)://HOST[:PORT]")


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except BaseError as error:
        raise Unavailable(
            "Our object storage does not answer; try again.", code="storage_unavailable", retry_after=5
        ) from error


def _reason(error: BaseException | None) -> str:
    """The first line of obstore's own words: method, address and status, no secret."""
    return str(error).splitlines()[0][:300] if error is not None else "it does not answer"
