"""`perennial jobs watch`: a job's events as they happen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import httpx2
import typer

from service.cli_client import end, sentence, service

PATIENCE_SECONDS = 60.0
"""How long a service that does not answer is tried again: it may be restarting."""
SILENCE_SECONDS = 120.0
"""A stream that says nothing for so long, not even that it is there, has broken off."""


class Said(NamedTuple):
    id: str | None
    type: str
    body: dict[str, Any]


def watch(job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Print what happens to a job until it has ended; status 1 if it did not succeed."""
    last_id, last_type, silent_since = None, "", time.monotonic()
    while True:
        try:
            for said in _stream(job, last_id):
                silent_since = time.monotonic()
                last_id, last_type = said.id or last_id, said.type if said.id else last_type
                typer.echo(_line(said))
            break
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            if time.monotonic() - silent_since > PATIENCE_SECONDS or isinstance(error, httpx2.InvalidURL):
                end(f"No service at {service()[0]}: {error}")
            time.sleep(1.0)
    raise typer.Exit(0 if last_type == "job.succeeded" else 1)


def _stream(job: str, last_id: str | None) -> Iterator[Said]:
    """Events after `last_id` until the job's end. Raises TransportError when the connection breaks off before."""
    url, headers = service()
    headers |= {"last-event-id": last_id} if last_id else {}
    with httpx2.stream("GET", f"{url}/v1/jobs/{job}/events", headers=headers, timeout=SILENCE_SECONDS) as answer:
        if answer.status_code >= 400:
            answer.read()
            end(sentence(answer))
        ended = answer.status_code == 204
        for said in _events(answer.iter_lines()):
            ended = said.type in ("job.succeeded", "job.failed", "job.cancelled")
            yield said
    if not ended:
        raise httpx2.RemoteProtocolError("the service ended the stream")


def _events(lines: Iterable[str]) -> Iterator[Said]:
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line and name:
            fields[name] = value
        elif not line and "data" in fields:
            yield Said(fields.get("id"), fields["event"], json.loads(fields["data"]))
        if not line:
            fields = {}


def _line(said: Said) -> str:
    body = said.body
    if said.type == "job.step":
        facts = body["metrics"]
    elif said.type == "job.progress":
        facts = body["progress"]
    else:
        facts = body.get("data", {}) | ({"version": body["version"]} if "version" in body else {})
    return f"{said.type:14} " + " ".join(f"{name}={_short(value)}" for name, value in facts.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
