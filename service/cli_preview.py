"""`perennial feedback preview`: what a batch would teach, for a reader at a terminal."""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from service.cli_client import call, show

POLL_SECONDS = 0.5


def preview(
    file: Annotated[Path, typer.Argument(help="A feedback batch as JSON, as POST /v1/feedback takes it; - for stdin.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole result.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the result.")] = 300.0,
) -> None:
    """What a batch would teach, token by token. Nothing is learnt from it."""
    key = {"idempotency-key": str(uuid.uuid4())}
    job = call("POST", "/v1/feedback/preview", json=_body(file), headers=key).json()
    until = time.monotonic() + timeout
    while job["status"] in ("queued", "running"):
        if time.monotonic() > until:
            _end(f"The preview is still {job['status']}: `perennial jobs show {job['id']}` shows it later.")
        time.sleep(POLL_SECONDS)
        job = call("GET", f"/v1/jobs/{job['id']}").json()
    if job["status"] != "succeeded":
        _end(f"The preview has {job['status']}: {(job['error'] or {}).get('message', 'nothing is known')}")
    if job["result"] is None:
        _end("The result was erased.")
    if as_json:
        show(job["result"])
    else:
        _print(job["result"])


def _body(file: Path) -> Any:
    try:
        return json.loads(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _end(f"{file} cannot be read as JSON: {error}")


def _print(result: dict[str, Any]) -> None:
    for number, item in enumerate(result["items"], 1):
        acts = "the teacher acts on it" if item["acts"] else "the teacher does not act on it"
        typer.echo(
            f"item {number}: {acts}; {item['moved_share']:.0%} of {item['response_tokens']} tokens moved, "
            f"largest gap {item['largest_gap']:.2f} nats, expected drift {item['expected_drift']:.2f}"
        )
        for token in item["tokens"]:
            if token["effect"] >= result["threshold"]:
                typer.echo(f"  {_shown(token)}  {token['student']:.2f} -> {token['teacher']:.2f}{_wanted(token)}")
        if item["tokens_left_out"]:
            typer.echo(f"  ({item['tokens_left_out']} more tokens are not shown)")


def _shown(piece: dict[str, Any]) -> str:
    """Text in quotes; of a part of a character its bytes."""
    if piece["bytes"] is not None:
        return f"<{bytes(piece['bytes']).hex(' ')}>"
    return json.dumps(piece["text"], ensure_ascii=False)


def _wanted(token: dict[str, Any]) -> str:
    choice = token["instead"]
    return "" if choice is None else f"  wants {_shown(choice)} ({choice['logprob']:.2f})"


def _end(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
