"""Several service processes on one database: which of them publishes, and what each may answer with.

An office is a lease with a fencing token, by the database's clock. A holder that was frozen past its lease may still
believe in it: so every change that it makes in the office's name checks the token in the same transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.db.engine import clock, upsert
from service.db.tables import Leader, ServiceProcess
from service.errors import Conflict

GONE_SECONDS = 3600.0
"""How long the row of a process that is gone is kept."""


class NotLeader(Conflict):
    """Another process has the office by now."""

    code = "not_leader"


@dataclass(frozen=True)
class Others:
    """What the other live processes said of themselves."""

    holds: frozenset[str]
    """Served names that they may answer with at any moment."""
    asked: frozenset[str] | None
    """Served names that were asked for lately; None: one of them has not watched long enough to say."""


def stand(s: Session, office: str, process: str, seconds: float) -> int | None:
    """Keep the office, or take it when it is free; its token, or None while another process has it."""
    now = clock(s)
    s.execute(upsert(s, Leader, {"office": office, "holder": process, "token": 0, "until": 0.0}, then=None))
    held = s.scalars(select(Leader).where(Leader.office == office).with_for_update()).one()
    if held.holder != process and held.until > now:
        return None
    if held.holder != process or held.token == 0:
        held.token += 1
    held.holder, held.until = process, now + seconds
    return held.token


def resign(s: Session, office: str, process: str) -> None:
    """The office is free at once; nothing when another process has it."""
    s.execute(update(Leader).where(Leader.office == office, Leader.holder == process).values(until=0.0))
    s.execute(delete(ServiceProcess).where(ServiceProcess.id == process))


def check(s: Session, office: str, token: int) -> None:
    """Raises NotLeader unless this token is the newest; nobody else takes the office before this transaction ends."""
    held = s.scalars(select(Leader).where(Leader.office == office).with_for_update(read=True)).first()
    if held is None or held.token != token:
        raise NotLeader("Another process publishes by now.")


def report(s: Session, process: str, holds: Collection[str], asked: Collection[str] | None, seconds: float) -> None:
    """What this process may answer with; it counts as alive for so many seconds."""
    now = clock(s)
    said = {"holds": sorted(holds), "asked": None if asked is None else sorted(asked), "until": now + seconds}
    s.execute(upsert(s, ServiceProcess, {"id": process} | said, then=said))
    s.execute(delete(ServiceProcess).where(ServiceProcess.until < now - GONE_SECONDS))


def others(s: Session, process: str) -> Others:
    alive: Sequence[ServiceProcess] = s.scalars(
        select(ServiceProcess).where(ServiceProcess.id != process, ServiceProcess.until > clock(s))
    ).all()
    asked = [p.asked for p in alive]
    known = [a for a in asked if a is not None]
    return Others(
        holds=frozenset(name for p in alive for name in p.holds),
        asked=frozenset(name for names in known for name in names) if len(known) == len(asked) else None,
    )
