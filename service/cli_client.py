"""Commands that speak to a running service over its API, with `PERENNIAL_URL` and `PERENNIAL_API_KEY`."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer

adapters_app = typer.Typer(no_args_is_help=True, help="Adapters and their versions.")
feedback_app = typer.Typer(no_args_is_help=True, help="Send feedback, see what became of it.")
jobs_app = typer.Typer(no_args_is_help=True, help="Training jobs.")

Name = Annotated[str, typer.Argument(help="The adapter's name.")]


def call(method: str, path: str, *, headers: dict[str, str] | None = None, **kwargs: Any) -> httpx2.Response:
    """One API call; an error answer ends the command with its sentence."""
    url = os.environ.get("PERENNIAL_URL", "http://127.0.0.1:8700").rstrip("/")
    key = os.environ.get("PERENNIAL_API_KEY", "").strip()
    if not (key.isascii() and key.replace("_", "").isalnum()):
        typer.echo("Set PERENNIAL_API_KEY to a key made by `perennial keys create`.", err=True)
        raise typer.Exit(1)
    try:
        response = httpx2.request(
            method, url + path, headers={"authorization": f"Bearer {key}", **(headers or {})}, timeout=300.0, **kwargs
        )
    except httpx2.TransportError as error:
        typer.echo(f"No service at {url}: {error}", err=True)
        raise typer.Exit(1) from error
    if response.status_code >= 400:
        detail = response.json()["error"]
        typer.echo(f"{detail['code']}: {detail['message']}", err=True)
        raise typer.Exit(1)
    return response


def show(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, ensure_ascii=False))


def chat(
    model: Annotated[str, typer.Argument(help="Adapter, name@v7, or the base model.")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
) -> None:
    """Ask once; prints the answer, the version that gave it and the id to send feedback on."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    answer = call("POST", "/v1/chat/completions", json=body).json()
    typer.echo(answer["choices"][0]["message"]["content"])
    typer.echo(f"[{answer['model']}  {answer['id']}]", err=True)


@adapters_app.command("create")
def create_adapter(
    name: Name,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 32,
    training: Annotated[str, typer.Option(help="Training settings as JSON.")] = "{}",
) -> None:
    """A new adapter at version 0, the base model."""
    body = {"name": name, "lora": {"rank": rank, "alpha": alpha}, "training": json.loads(training)}
    show(call("POST", "/v1/adapters", json=body).json())


@adapters_app.command("list")
def list_adapters() -> None:
    """Your adapters."""
    show(call("GET", "/v1/adapters", params={"limit": 100}).json()["data"])


@adapters_app.command("versions")
def list_versions(name: Name) -> None:
    """Versions of an adapter, oldest first."""
    for v in call("GET", f"/v1/adapters/{name}/versions", params={"limit": 100}).json()["data"]:
        mark = "live" if v["live"] else v["status"]
        typer.echo(
            f"v{v['version']:<4} {mark:10} from v{v['parent']:<4} {v['digest'][:19]}  {len(v['feedback_ids'])} items"
        )


@adapters_app.command("promote")
def promote(name: Name, version: Annotated[int, typer.Argument(help="0 is the base model.")]) -> None:
    """Serve a version and train on from it; also the rollback."""
    show(call("POST", f"/v1/adapters/{name}/promote", json={"version": version}).json())


@adapters_app.command("download")
def download(
    name: Name,
    version: Annotated[int, typer.Argument()],
    output: Annotated[Path | None, typer.Option(help="Target file.")] = None,
) -> None:
    """Fetch a version as a zip of its PEFT directory."""
    target = output or Path(f"{name}-v{version}.zip")
    target.write_bytes(call("GET", f"/v1/adapters/{name}/versions/{version}/download").content)
    typer.echo(str(target))


@adapters_app.command("delete")
def delete_adapter(name: Name) -> None:
    """Delete an adapter and its versions."""
    show(call("DELETE", f"/v1/adapters/{name}").json())


@feedback_app.command("send")
def send_feedback(
    completion_id: Annotated[str, typer.Argument(help="Id of the answer.")],
    remark: Annotated[str, typer.Argument(help="What should be different.")],
    once: Annotated[bool, typer.Option(help="Holds for this answer alone, not from now on.")] = False,
) -> None:
    """A remark on one answer."""
    body = {"items": [{"completion_id": completion_id, "feedback": remark, "standing": not once}]}
    show(call("POST", "/v1/feedback", json=body, headers={"idempotency-key": str(uuid.uuid4())}).json())


@feedback_app.command("show")
def show_feedback(batch: Annotated[str, typer.Argument(help="Id of the batch.")]) -> None:
    """A batch and what became of it."""
    show(call("GET", f"/v1/feedback/{batch}").json())


@jobs_app.command("list")
def list_jobs(adapter: Annotated[str | None, typer.Option(help="Of this adapter alone.")] = None) -> None:
    """Newest first."""
    params = {"limit": 100} | ({"adapter": adapter} if adapter else {})
    for job in call("GET", "/v1/jobs", params=params).json()["data"]:
        version = f"v{job['version']}" if job["version"] else "-"
        typer.echo(f"{job['id']}  {job['status']:10} {job['adapter']:20} {version}")


@jobs_app.command("show")
def show_job(job: Annotated[str, typer.Argument()]) -> None:
    """State, progress, per-step metrics and the resulting version."""
    show(call("GET", f"/v1/jobs/{job}").json())


@jobs_app.command("cancel")
def cancel_job(job: Annotated[str, typer.Argument()]) -> None:
    """End a queued or running job."""
    show(call("POST", f"/v1/jobs/{job}/cancel").json())
