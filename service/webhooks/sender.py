"""The loop that delivers. Each endpoint has its own pace: a slow one holds up no other."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import anyio
import httpx2
from sqlalchemy.orm import Session

from api_schemas.events import Event as WireEvent
from service.bell import Bell
from service.db.engine import Database
from service.errors import PerennialError
from service.job_events import view
from service.store import deliveries
from service.store.deliveries import Due, Result
from service.store.keys import KeyRing
from service.webhooks import signing
from service.webhooks.guard import Policy, Refused

log = logging.getLogger(__name__)
TIMEOUT = 15.0
"""Of one attempt in all, seconds. Well below `deliveries.ATTEMPT_SECONDS`."""
LOOK_SECONDS = 1.0
"""Between two looks at the outbox; no bell: under load it would ring for every request."""
AT_ONCE = 4
"""Attempts of one endpoint at the same time."""
ENDPOINTS = 16
TIDY_SECONDS = 3600.0
T = TypeVar("T")


class Sender:
    def __init__(self, database: Database, ring: KeyRing, policy: Policy, *, backoff: float) -> None:
        """`backoff`: seconds before the second attempt."""
        self._db, self._ring, self._policy = database, ring, policy
        self._backoff = backoff
        self._bell = Bell()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._tidied = time.monotonic()

    async def run(self) -> None:
        """For ever; does nothing where no host is allowed."""
        if not self._policy.hosts:
            return
        # No proxies from the environment: they would connect for us, to whatever address they find.
        async with httpx2.AsyncClient(timeout=TIMEOUT, follow_redirects=False, trust_env=False) as client:
            try:
                while True:
                    ticket = self._bell.ticket()
                    if not await self._pass(client):
                        await Bell.wait(ticket, LOOK_SECONDS)
            finally:
                for task in self._busy.values():
                    task.cancel()
                await asyncio.gather(*self._busy.values(), return_exceptions=True)

    async def _pass(self, client: httpx2.AsyncClient) -> bool:
        """One look at outbox and deliveries; whether there may be more to do at once."""
        try:
            moved = await self._write(deliveries.fan_out)
            due = await self._write(self._begin) if len(self._busy) < ENDPOINTS else []
            if time.monotonic() - self._tidied > TIDY_SECONDS:
                self._tidied = time.monotonic()
                await self._write(deliveries.tidy)
        except PerennialError as error:
            log.warning("webhooks: wait for the database: %s", error.code)
            return False
        if due:
            webhook_id = due[0].webhook_id
            self._busy[webhook_id] = task = asyncio.create_task(self._deliver(client, due))
            task.add_done_callback(lambda _: self._done(webhook_id))
        return bool(moved or due)

    def _begin(self, s: Session) -> list[Due]:
        return deliveries.begin(s, busy=list(self._busy), limit=AT_ONCE)

    def _done(self, webhook_id: str) -> None:
        del self._busy[webhook_id]
        self._bell.ring()

    async def _deliver(self, client: httpx2.AsyncClient, due: list[Due]) -> None:
        async def one(each: Due) -> None:
            result = await self._attempt(client, each)
            try:
                await self._write(lambda s: deliveries.record(s, each, result, self._backoff))
            except PerennialError as error:  # it is due again by itself
                log.warning("webhooks: %s could not be written down: %s", each.id, error.code)

        await asyncio.gather(*(one(each) for each in due))

    async def _attempt(self, client: httpx2.AsyncClient, due: Due) -> Result:
        """Send it once. Of the answer only the status counts; its body is not read."""
        url, body = urlsplit(due.url), payload(due)
        secrets = [signing.secret_of(self._ring, due.webhook_id, g) for g in due.generations]
        headers = signing.headers(secrets, due.id, int(due.now), body) | {"host": url.netloc}
        try:
            async with asyncio.timeout(TIMEOUT):
                self._policy.check_url(due.url)  # what is allowed may have changed since it was made
                target = _at(url, await self._policy.address_of(url))
                name = {"sni_hostname": url.hostname}
                async with client.stream("POST", target, content=body, headers=headers, extensions=name) as answer:
                    return Result(answer.status_code, retry_after=_seconds(answer.headers.get("retry-after", "")))
        except TimeoutError:
            return Result(None, f"no answer within {TIMEOUT:.0f} s")
        except (Refused, PerennialError) as error:
            return Result(None, str(error))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Result(None, f"{type(error).__name__}: {error}")

    async def _write(self, work: Callable[[Session], T]) -> T:
        def transaction() -> T:
            with self._db.write() as s:
                return work(s)

        return await anyio.to_thread.run_sync(transaction)


def payload(due: Due) -> bytes:
    """The same bytes with each attempt."""
    event: WireEvent = view(due.event)
    happened = datetime.fromtimestamp(due.event.created_at, UTC).isoformat().replace("+00:00", "Z")
    facts = {"adapter": due.adapter} | event.model_dump(exclude_none=True, exclude={"type", "created_at"})
    return json.dumps({"type": event.type, "timestamp": happened, "data": facts}, separators=(",", ":")).encode()


def _at(url: SplitResult, address: str) -> str:
    """The URL with the checked address in place of the name."""
    host = f"[{address}]" if ":" in address else address
    return url._replace(netloc=f"{host}:{url.port}" if url.port else host).geturl()


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
