"""Commands that speak to a running service over its API, with `PERENNIAL_URL` and `PERENNIAL_API_KEY`."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx2
import typer

adapters_app = typer.Typer(no_args_is_help=True, help="Adapters and their versions.")
feedback_app = typer.Typer(no_args_is_help=True, help="Send feedback, see what became of it.")
jobs_app = typer.Typer(no_args_is_help=True, help="Training jobs.")

Name = Annotated[str, typer.Argument(help="The adapter's name.")]


def call(method: str, path: str, *, headers: dict[str, str] | None = None, **kwargs: Any) -> httpx2.Response:
    """One API call; an error answer ends the command with its sentence."""
    url, key_header = service()
    try:
        response = httpx2.request(method, url + path, headers=key_header | (headers or {}), timeout=300.0, **kwargs)
    except (httpx2.TransportError, httpx2.InvalidURL, UnicodeError) as error:
        end(f"No service at {url}: {error}")
    if response.status_code >= 400:
        end(sentence(response))
    return response


def service() -> tuple[str, dict[str, str]]:
    """Its address, and the header that holds the key."""
    url = os.environ.get("PERENNIAL_URL", "http://127.0.0.1:8700").strip().rstrip("/")
    key = os.environ.get("PERENNIAL_API_KEY", "").strip()
    if not (key.isascii() and key.replace("_", "").isalnum()):
        end("Set PERENNIAL_API_KEY to a key made by `perennial keys create`.")
    return url, {"authorization": f"Bearer {key}"}


def fetch(method: str, path: str, **kwargs: Any) -> Any:
    """The JSON of an answer."""
    response = call(method, path, **kwargs)
    try:
        return response.json()
    except ValueError:
        end(f"What answers at {response.url} is no Perennial: PERENNIAL_URL is the service's address, without /v1.")


def sentence(response: httpx2.Response) -> str:
    """The error's code and message; of what is no answer of ours, the status."""
    try:
        detail = response.json()["error"]
        return f"{detail['code']}: {detail['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code}: is PERENNIAL_URL the service's address, without /v1?"


def end(message: str) -> NoReturn:
    """Of the command, with status 1."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


def show(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, ensure_ascii=False))


def chat(
    model: Annotated[str, typer.Argument(help="Adapter, name@v7, or the base model.")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
) -> None:
    """Ask once; prints the answer, the version that gave it and the id to send feedback on."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    answer = fetch("POST", "/v1/chat/completions", json=body)
    message = answer["choices"][0]["message"]
    typer.echo(message["content"] or json.dumps(message, ensure_ascii=False))
    typer.echo(f"[{answer['model']}  {answer['id']}]", err=True)


@adapters_app.command("create")
def create_adapter(
    name: Name,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 32,
    training: Annotated[str, typer.Option(help="Training settings as JSON.")] = "{}",
) -> None:
    """A new adapter at version 0, the base model."""
    try:
        settings = json.loads(training)
    except ValueError as error:
        end(f"--training is not JSON: {error}")
    body = {"name": name, "lora": {"rank": rank, "alpha": alpha}, "training": settings}
    show(fetch("POST", "/v1/adapters", json=body))


@adapters_app.command("list")
def list_adapters() -> None:
    """Your adapters."""
    show(fetch("GET", "/v1/adapters", params={"limit": 100})["data"])


@adapters_app.command("versions")
def list_versions(name: Name) -> None:
    """Versions of an adapter, oldest first."""
    for v in fetch("GET", f"/v1/adapters/{name}/versions", params={"limit": 100})["data"]:
        mark = "live" if v["live"] else v["status"]
        typer.echo(
            f"v{v['version']:<4} {mark:10} from v{v['parent']:<4} {v['digest'][:19]}  {len(v['feedback_ids'])} items"
        )


@adapters_app.command("promote")
def promote(name: Name, version: Annotated[int, typer.Argument(help="0 is the base model.")]) -> None:
    """Serve a version and train on from it; also the rollback."""
    show(fetch("POST", f"/v1/adapters/{name}/promote", json={"version": version}))


@adapters_app.command("download")
def download(
    name: Name,
    version: Annotated[int, typer.Argument()],
    output: Annotated[Path | None, typer.Option(help="Target file.")] = None,
) -> None:
    """Fetch a version as a zip of its PEFT directory."""
    target = output or Path(f"{name}-v{version}.zip")
    content = call("GET", f"/v1/adapters/{name}/versions/{version}/download").content
    try:
        target.write_bytes(content)
    except OSError as error:
        end(f"{target} cannot be written: {error.strerror}")
    typer.echo(str(target))


@adapters_app.command("delete")
def delete_adapter(name: Name) -> None:
    """Delete an adapter and its versions."""
    show(fetch("DELETE", f"/v1/adapters/{name}"))


@adapters_app.command("pause")
def pause_adapter(name: Name) -> None:
    """Queued training waits; chats and feedback go on."""
    show(fetch("POST", f"/v1/adapters/{name}/pause"))


@adapters_app.command("resume")
def resume_adapter(name: Name) -> None:
    """Queued training goes on, also past a failed job that blocks it."""
    show(fetch("POST", f"/v1/adapters/{name}/resume"))


@feedback_app.command("send")
def send_feedback(
    completion_id: Annotated[str, typer.Argument(help="Id of the answer.")],
    remark: Annotated[str, typer.Argument(help="What should be different.")],
    once: Annotated[bool, typer.Option(help="Holds for this answer alone, not from now on.")] = False,
) -> None:
    """A remark on one answer."""
    body = {"items": [{"completion_id": completion_id, "feedback": remark, "standing": not once}]}
    show(fetch("POST", "/v1/feedback", json=body, headers={"idempotency-key": str(uuid.uuid4())}))


@feedback_app.command("show")
def show_feedback(batch: Annotated[str, typer.Argument(help="Id of the batch.")]) -> None:
    """A batch and what became of it."""
    show(fetch("GET", f"/v1/feedback/{batch}"))


@jobs_app.command("list")
def list_jobs(
    adapter: Annotated[str | None, typer.Option(help="Of this adapter alone.")] = None,
    status: Annotated[str | None, typer.Option(help="E.g. failed: the dead letters.")] = None,
) -> None:
    """Newest first."""
    given = {"adapter": adapter, "status": status}
    params = {"limit": 100} | {name: value for name, value in given.items() if value}
    for job in fetch("GET", "/v1/jobs", params=params)["data"]:
        version = f"v{job['version']}" if job["version"] else "-"
        if job["version"] and job["status"] == "failed":
            version += " (no engine serves it)"
        typer.echo(f"{job['id']}  {job['status']:10} {job['adapter']:20} {version}")


@jobs_app.command("show")
def show_job(job: Annotated[str, typer.Argument()]) -> None:
    """State, progress, per-step metrics and the resulting version."""
    show(fetch("GET", f"/v1/jobs/{job}"))


@jobs_app.command("cancel")
def cancel_job(job: Annotated[str, typer.Argument()]) -> None:
    """End a queued or running job."""
    show(fetch("POST", f"/v1/jobs/{job}/cancel"))


@jobs_app.command("requeue")
def requeue_job(job: Annotated[str, typer.Argument()]) -> None:
    """Try a failed job again."""
    show(fetch("POST", f"/v1/jobs/{job}/requeue"))
