"""Commands for whoever runs the service: `doctor`, `scrub`, `erase-tenant`. They work on the database and the files."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from service.db.engine import Database
from service.db.tables import Adapter, ApiKey, Tenant
from service.doctor.examine import examine
from service.doctor.findings import Finding
from service.errors import PerennialError
from service.serving.garbage import GRACE_SECONDS
from service.settings import Settings
from service.store import adapters, chosen, erasure, keys, scrubbing

CANNOT_LOOK = 2


def doctor(
    repair: Annotated[bool, typer.Option(help="Set right what can be; by default nothing is changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    engines: Annotated[bool, typer.Option(help="Ask the engines what they hold.")] = True,
    grace: Annotated[float, typer.Option(min=0, help="Seconds before what belongs to nobody counts.")] = GRACE_SECONDS,
) -> None:
    """Compare database, files and engines. Exit status: 0 all is well or was set right, 1 something is not, 2 no look
    was possible. May be run while the service runs."""
    settings = Settings()
    database = Database(settings.db_url, busy_seconds=settings.database_busy_seconds)
    try:
        seen = [_treated(f, repair) for f in examine(database, settings, grace=grace, with_engines=engines)]
    except (PerennialError, SQLAlchemyError) as error:
        typer.echo(f"The database cannot be examined: {error}", err=True)
        raise typer.Exit(CANNOT_LOOK) from error
    finally:
        database.close()
    left = [f for f in seen if f["level"] == "error" and not f["repaired"]]
    if as_json:
        typer.echo(json.dumps({"ok": not left, "findings": seen}, indent=2))
    else:
        _print(seen, len(left))
    raise typer.Exit(1 if left else 0)


def _treated(finding: Finding, repair: bool) -> dict[str, Any]:
    """The finding as it is told, after its repair where that was asked for."""
    told = {k: getattr(finding, k) for k in ("level", "code", "subject", "message")}
    repaired = False
    if repair and finding.repair is not None:
        try:
            finding.repair()
            repaired = True
        except (PerennialError, OSError) as error:
            told["message"] += f" The repair failed: {error}"
    return told | {"repairable": finding.repair is not None, "repaired": repaired}


def _print(seen: list[dict[str, Any]], left: int) -> None:
    for f in seen:
        state = "repaired" if f["repaired"] else "can be repaired" if f["repairable"] else f["level"]
        typer.echo(f"{state:15} {f['code']:24} {f['subject']}\n{'':15} {f['message']}")
    typer.echo("All is well." if not left else f"{left} left. `perennial doctor --repair` sets right what can be.")


def scrub() -> None:
    """Write the database's files anew, so that no byte of what was erased stays in them."""
    settings = Settings()
    database = Database(settings.db_url, busy_seconds=settings.database_busy_seconds)
    try:
        with database.write() as s:
            scrubbing.wanted(s)
        scrubbing.scrub(database)
    except PerennialError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(1) from error
    finally:
        database.close()
    typer.echo("The database was written anew.")


def erase_tenant(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it: there is no way back.")] = False,
) -> None:
    """Everything of one tenant: answers, feedback, adapters, keys."""
    settings = Settings()
    database = Database(settings.db_url, busy_seconds=settings.database_busy_seconds)
    with database.read() as s:
        tenant_id = s.scalar(select(Tenant.id).where(Tenant.name == tenant))
    if tenant_id is None or not yes:
        typer.echo("There is no such tenant." if tenant_id is None else "Say --yes to erase all of it.", err=True)
        raise typer.Exit(1)
    with database.write() as s:
        for adapter in s.scalars(select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))):
            adapters.delete(s, adapter)
        for key in s.scalars(select(ApiKey.id).where(ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None))):
            keys.revoke(s, key)
    done = erasure.Erased()
    erasure.erase_all(database, tenant_id, chosen.of_tenant(tenant_id), done)
    try:
        scrubbing.scrub(database)
    except PerennialError:
        typer.echo("The database is busy: run `perennial scrub` later.", err=True)
    typer.echo(
        f"{len(done.items)} items and {len(done.rollouts)} answers are gone; files go when no engine holds them."
    )
    database.close()
