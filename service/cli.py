"""The `perennial` command."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import httpx2
import typer
from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from service import context as contexts
from service import first_run, server
from service.app import create_app
from service.cli_client import adapters_app, chat, feedback_app, jobs_app
from service.cli_preview import preview as preview_feedback
from service.cli_upkeep import doctor, erase_tenant, scrub
from service.cli_watch import watch
from service.db import migrate as migrations
from service.db.engine import Database
from service.errors import PerennialError
from service.local import LocalConfig, LocalStack, PartFailed, check_memory
from service.settings import Settings
from service.store import keys

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Feedback in, a better served adapter out.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of tenants and workers.")
app.add_typer(keys_app, name="keys")
app.add_typer(adapters_app, name="adapters")
app.add_typer(feedback_app, name="feedback")
app.add_typer(jobs_app, name="jobs")
feedback_app.command("preview")(preview_feedback)
jobs_app.command("watch")(watch)
app.command("chat")(chat)
app.command("doctor")(doctor)
app.command("scrub")(scrub)
app.command("erase-tenant")(erase_tenant)

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"


@app.command()
def up(
    data_dir: Annotated[Path, typer.Option(help="Database, adapters, keys and logs.")] = Path("perennial-data"),
    model: Annotated[Path, typer.Option(help="Directory of the base model.")] = DEMO_MODEL,
    base_model: Annotated[str | None, typer.Option(help="The name that clients see.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the API; 0 picks one.")] = 8700,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Service, worker and embedded engine in one go."""
    name = base_model or ("perennial-demo" if model == DEMO_MODEL else model.absolute().name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        check_memory(model, device)
        stack = LocalStack(LocalConfig(data_dir, model, name, host=host, port=port, device=device))
        with stack:
            typer.echo(f"Perennial is up: {stack.url}\nAPI key:         {stack.api_key}")
            typer.echo(f"Base model:      {name}\nLogs:            {stack.data / 'logs'}\nCtrl-C stops it.")
            stack.watch()
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    except (PartFailed, OSError) as error:
        _end(str(error))


@app.command()
def serve() -> None:
    """The service alone, set up by PERENNIAL_* variables (docs/operations.md)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for library in ("httpx2", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    settings = _settings()
    _migrated(settings).close()
    try:
        context = contexts.build(settings)
    except (OSError, PerennialError) as error:
        _end(str(error))
    server.run(create_app(context), context)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def worker(ctx: typer.Context) -> None:
    """The training worker; `perennial worker --help` lists its options."""
    os.execv(sys.executable, [sys.executable, "-m", "worker", *ctx.args])  # noqa: S606 - our own module


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def engine(ctx: typer.Context) -> None:
    """The embedded inference engine; `perennial engine --help` lists its options."""
    os.execv(sys.executable, [sys.executable, "-m", "worker.engine", *ctx.args])  # noqa: S606 - our own module


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def preflight(ctx: typer.Context) -> None:
    """Will model, training and engine fit this machine? `perennial preflight --help` lists its options."""
    os.execv(sys.executable, [sys.executable, "-m", "worker.preflight", *ctx.args])  # noqa: S606 - our own module


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema."""
    settings = _settings()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        migrations.migrate(Database(settings.db_url))
    except (OSError, SQLAlchemyError, PerennialError) as error:
        _end(f"The database cannot be used: {error}")
    typer.echo("The database is up to date.")


@app.command()
def init(
    client_key: Annotated[Path | None, typer.Option(help="File of the first client's key.")] = None,
    worker_key: Annotated[Path | None, typer.Option(help="File of the worker's key.")] = None,
) -> None:
    """First run: migrate, and make the two key files (in the data directory by default). Safe to repeat."""
    try:
        settings = Settings()
        data = settings.data_dir
        first_run.prepare(settings, client_key or data / "client.key", worker_key or data / "worker.key")
    except (OSError, ValueError, SQLAlchemyError, PerennialError) as error:
        _end(f"The installation cannot be prepared: {error}")
    typer.echo("Database and keys are there.")


@app.command()
def health(
    url: Annotated[str, typer.Argument(help="/healthz, /health, or /readyz with --part.")],
    part: Annotated[str | None, typer.Option(help="Only this part of /readyz counts.")] = None,
) -> None:
    """Exit status 0 when this URL says that all is well: what containers' health checks run."""
    try:
        answer = httpx2.get(url, timeout=5.0)
        well = answer.status_code == 200 if part is None else answer.json()["parts"][part] == "ok"
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError) as error:
        _end(f"{url}: {error!r}")
    if not well:
        _end(f"{url}: {answer.status_code} {answer.text[:200]}")
    typer.echo("ok")


@keys_app.command("create")
def create_key(
    tenant: Annotated[str | None, typer.Option(help="Owner; made if new.")] = None,
    name: Annotated[str, typer.Option(help="A word to recognise the key by.")] = "unnamed",
    scope: Annotated[list[str] | None, typer.Option(help="Repeat for several; all client scopes by default.")] = None,
    worker_key: Annotated[bool, typer.Option("--worker", help="A worker's key, of no tenant.")] = False,
    days: Annotated[float | None, typer.Option(min=0, help="Valid for so many days; for ever by default.")] = None,
) -> None:
    """Make an API key and print it, this one time."""
    if worker_key and (tenant or scope):
        _end("A worker's key has neither tenant nor scopes of its own.")
    scopes = keys.WORKER_SCOPES if worker_key else frozenset(scope or keys.CLIENT_SCOPES)
    settings = _settings()
    database = _migrated(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    ring = keys.KeyRing(keys.server_secret(settings.data_dir / "server.secret"))
    owner = None if worker_key else tenant or keys.DEFAULT_TENANT
    try:
        with database.write() as s:
            key = ring.create(
                s, tenant=owner, name=name, scopes=scopes, expires_in=None if days is None else days * 86400
            )
    except PerennialError as error:
        _end(error.message)
    typer.echo(key)


@keys_app.command("list")
def list_keys() -> None:
    """Public ids, owners and scopes; the keys themselves are not kept."""
    with _migrated(_settings()).read() as s:
        for key, tenant in keys.listing(s):
            state = "revoked" if key.revoked_at else "active"
            typer.echo(f"{key.id}  {tenant or '(worker)':20} {state:8} {key.name:20} {','.join(key.scopes)}")


@keys_app.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(help="The whole key, or its public id as `list` shows it.")]) -> None:
    """End a key at once."""
    try:
        with _migrated(_settings()).write() as s:
            keys.revoke(s, keys.public_id(key))
    except PerennialError as error:
        _end(error.message)
    typer.echo("Revoked.")


def _settings() -> Settings:
    """From the environment; ends the command with the variable at fault."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(f"PERENNIAL_{part}: ".upper() for part in first["loc"][:1])
        _end(f"{name}{first['msg']}")
    except (OSError, ValueError) as error:  # of a file named by PERENNIAL_..._FILE
        _end(str(error))


def _migrated(settings: Settings) -> Database:
    """The database, if it has this version's schema; else the command ends and says what to do."""
    file = make_url(settings.db_url)
    if file.get_backend_name() == "sqlite" and not Path(file.database or "").exists():
        _end(f"There is no database at {file.database}: run `perennial migrate` first, or set PERENNIAL_DATA_DIR.")
    database = Database(settings.db_url)
    try:
        pending = migrations.pending(database)
    except SQLAlchemyError as error:
        _end(f"The database cannot be used: {error}")
    if pending:
        _end("The database is not on this version's schema: run `perennial migrate` first.")
    return database


def _end(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
