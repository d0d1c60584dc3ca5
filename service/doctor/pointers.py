"""Adapters' rows: where their pointers, counters and leases lead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.engine import Database, clock
from service.db.tables import Adapter, Job, Run, Version
from service.doctor.findings import Finding
from service.store import adapters, transitions

LEASES = 10
"""A lease that ends later than so many of its lengths from now was granted by a clock that was wrong."""


def check(database: Database, lease_seconds: float) -> Iterator[Finding]:
    """Every living adapter."""
    with database.read() as s:
        ids = list(s.scalars(select(Adapter.id).where(Adapter.deleted_at.is_(None)).order_by(Adapter.id)))
    for adapter_id in ids:
        with database.read() as s:
            found = list(_of(s, s.get_one(Adapter, adapter_id), lease_seconds))
        for code, message, mend in found:
            yield Finding(code, adapter_id, message, _repair(database, adapter_id, code, lease_seconds, mend))


Mend = Callable[[Session, Adapter], None]


def _repair(database: Database, adapter_id: str, code: str, lease_seconds: float, mend: Mend) -> Callable[[], None]:
    """Under the adapter's lock, if it is still so."""

    def repair() -> None:
        with database.write() as s:
            adapter = adapters.locked(s, adapter_id)
            if any(c == code for c, _, _ in _of(s, adapter, lease_seconds)):
                mend(s, adapter)

    return repair


def _of(s: Session, adapter: Adapter, lease_seconds: float) -> Iterator[tuple[str, str, Mend]]:
    yield from _aims(s, adapter)
    yield from _counters(s, adapter)
    yield from _leases(s, adapter, lease_seconds)


def _aims(s: Session, adapter: Adapter) -> Iterator[tuple[str, str, Mend]]:
    for name, n in (("live", adapter.live_n), ("head", adapter.head_n)):
        if (why := _unusable(s, adapter, n)) is None:
            continue
        to = _last_good(s, adapter, n)

        def mend(s: Session, adapter: Adapter, name: str = name, to: int = to) -> None:
            adapters.move_head(s, adapter, to if name == "head" else adapter.head_n)
            adapter.live_n = to if name == "live" else adapter.live_n

        yield f"{name}_unusable", f"Its {name} version {n} {why}; the nearest good one is {to}.", mend


def _unusable(s: Session, adapter: Adapter, n: int) -> str | None:
    if n == 0:
        return None
    version = s.get(Version, (adapter.id, n))
    if version is None:
        return "does not exist"
    if version.status == "rejected":
        return "was rejected"
    return "has no files any more" if version.files_doomed_at is not None else None


def _last_good(s: Session, adapter: Adapter, n: int) -> int:
    """The nearest ancestor that can be served; of a version that has no row, the newest version that can; else 0."""
    version = s.get(Version, (adapter.id, n))
    while version is not None and _unusable(s, adapter, version.n) is not None:
        version = s.get(Version, (adapter.id, version.parent_n))
    if version is not None:
        return version.n
    if s.get(Version, (adapter.id, n)) is not None:
        return 0
    newest = select(func.max(Version.n)).where(
        Version.adapter_id == adapter.id, Version.status == "published", Version.files_doomed_at.is_(None)
    )
    return s.scalar(newest) or 0


def _counters(s: Session, adapter: Adapter) -> Iterator[tuple[str, str, Mend]]:
    open_jobs = _count(s, adapter)
    if adapter.open_jobs != open_jobs:

        def recount(s: Session, adapter: Adapter) -> None:
            adapter.open_jobs = _count(s, adapter)

        yield "open_jobs_wrong", f"It counts {adapter.open_jobs} open jobs and has {open_jobs}.", recount
    for name, least in _least_counters(s, adapter).items():
        if getattr(adapter, name) < least:

            def lift(_s: Session, adapter: Adapter, name: str = name, least: int = least) -> None:
                setattr(adapter, name, max(getattr(adapter, name), least))

            yield f"{name}_behind", f"Its {name} is {getattr(adapter, name)}, and {least} would be the least.", lift


def _count(s: Session, adapter: Adapter) -> int:
    waiting = select(func.count()).select_from(Job)
    return s.scalar(waiting.where(Job.adapter_id == adapter.id, Job.state.in_(transitions.OPEN))) or 0


def _least_counters(s: Session, adapter: Adapter) -> dict[str, int]:
    """Numbers that were given out must not be given out again."""
    newest = select(func.max(Version.n)).where(Version.adapter_id == adapter.id)
    last = select(func.max(Job.seq)).where(Job.adapter_id == adapter.id)
    token = select(func.max(Run.token)).where(Run.adapter_id == adapter.id)
    return {
        "next_n": (s.scalar(newest) or 0) + 1,
        "next_seq": (s.scalar(last) or 0) + 1,
        "token": s.scalar(token) or 0,
    }


def _leases(s: Session, adapter: Adapter, lease_seconds: float) -> Iterator[tuple[str, str, Mend]]:
    run = s.get(Run, adapter.lease_run) if adapter.lease_run is not None else None
    if adapter.lease_run is not None and (run is None or run.state != "running" or adapter.lease_until is None):

        def free(s: Session, adapter: Adapter) -> None:
            adapters.move_head(s, adapter, adapter.head_n)

        yield "lease_dangling", f"It is leased to run {adapter.lease_run}, which does not run.", free
    elif adapter.lease_until is not None and adapter.lease_until > clock(s) + LEASES * lease_seconds:

        def shorten(s: Session, adapter: Adapter) -> None:
            adapter.lease_until = clock(s) + lease_seconds

        seconds = adapter.lease_until - clock(s)
        yield "lease_too_long", f"Its lease ends in {seconds:.0f} s; a lease lasts {lease_seconds:.0f} s.", shorten
    yield from _strays(s, adapter)


def _strays(s: Session, adapter: Adapter) -> Iterator[tuple[str, str, Mend]]:
    """Runs and jobs that are said to run under no lease."""
    runs = _stray_runs(s, adapter)
    if runs:

        def close(s: Session, adapter: Adapter) -> None:
            for run in _stray_runs(s, adapter):
                run.state, run.ended_at = "lost", clock(s)

        yield "run_without_lease", f"Run {runs[0].id} is said to run, and has no lease.", close
    jobs = _stray_jobs(s, adapter)
    if jobs:

        def requeue(s: Session, adapter: Adapter) -> None:
            for job in _stray_jobs(s, adapter):
                transitions.queued(s, adapter, job, clock(s), "found_without_lease")

        yield "job_without_run", f"Job {jobs[0].id} is said to run, and no run has it.", requeue


def _stray_runs(s: Session, adapter: Adapter) -> list[Run]:
    running = select(Run).where(Run.adapter_id == adapter.id, Run.state == "running")
    return [r for r in s.scalars(running) if r.id != adapter.lease_run]


def _stray_jobs(s: Session, adapter: Adapter) -> list[Job]:
    running = select(Job).where(Job.adapter_id == adapter.id, Job.state == "running").order_by(Job.seq)
    return [j for j in s.scalars(running) if adapter.lease_run is None or j.run_id != adapter.lease_run]
