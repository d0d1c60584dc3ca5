"""Power cuts: whatever moment the power goes at, what was acknowledged is there, whole, once and in order.

    python -m tests.durability.power --cuts 50000 --seed 1

Records what the store makes SQLite write (`scenario`, `recorder`), cuts at random moments (`disk`), opens what is left
and compares. Choices follow the seed; ids are the store's own random ones.
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from service.db import migrate
from service.db.engine import Database
from service.errors import PerennialError
from tests.durability import store_calls as call
from tests.durability import version_files
from tests.durability.disk import Disk, Event, Mark, scratch
from tests.durability.invariants import Query, violations
from tests.durability.scenario import NAMES, Life, content
from tests.durability.sqlite_driver import driver

REPORT = Path("build/reports/power.json")
JOURNALS = ("wal", "wal", "truncate")
STEPS = 150
"""Transactions of one recording."""
CUTS = 500
"""Cuts in one recording."""
RESTARTS = 0.02
"""Share of the cuts after which the whole product is started on what is left; the others get a write and an integrity
check."""


@dataclass
class Tally:
    cuts: int = 0
    recordings: int = 0
    restarts: int = 0
    promises: int = 0
    """Acknowledged transactions, summed over all cuts, that had to be there."""
    fell: Counter[str] = field(default_factory=Counter)
    """Where cuts fell: inside of a transaction, or between two."""
    faults: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        kinds = Counter(fault.split(":")[0] for fault in self.faults)
        return {
            "cuts": self.cuts, "lost": kinds["lost"], "corrupt": kinds["corrupt"], "refused": kinds["refused"],
            "promises_checked": self.promises, "recordings": self.recordings, "restarts": self.restarts,
            "inside_a_transaction": self.fell["inside"], "between_transactions": self.fell["between"],
            "faults": self.faults[:10],
        }  # fmt: skip


def record(life: Life, start: Path, steps: int) -> None:
    """One life: from the first start of all, or from what an earlier cut left in `start`, recovery included."""
    files = {p.name: p for p in start.iterdir()} if start.is_dir() else {}
    if files:
        life.recorder.adopt(files)
        life.recorder.mark("done", _content_of(files))
    for name, path in files.items():
        shutil.copy(path, life.directory / name)
    if not files:
        life.recorder.mark("first start")
        migrate.migrate(life.database)
    life.run(steps)


def _content_of(files: dict[str, Path]) -> str:
    with tempfile.TemporaryDirectory(dir=next(iter(files.values())).parents[1]) as copy:
        for name, path in files.items():
            shutil.copy(path, Path(copy) / name)
        connection = apsw.Connection(f"{copy}/perennial.db")
        try:
            return content(lambda sql: connection.execute(sql).fetchall())
        finally:
            connection.close()


def allowed(log: list[Event]) -> list[tuple[int, tuple[str, ...]]]:
    """(position, contents that a cut from here on may leave), in order."""
    found: list[tuple[int, tuple[str, ...]]] = []
    marks = [(n, e) for n, e in enumerate(log) if isinstance(e, Mark)]
    now = ""
    for at, (position, mark) in enumerate(marks):
        if mark.kind == "done":
            now = mark.value
            found.append((position, (now,)))
        elif mark.kind == "began" and now:
            after = next((m.value for _, m in marks[at:] if m.kind == "done"), now)
            found.append((position, (now, after)))
    return found


def cut_often(life: Life, cuts: int, tally: Tally, start: Path) -> None:
    """Cut a recorded life at random moments. What one of the cuts leaves is kept in `start`, for another life."""
    log, disk, at = life.recorder.log, Disk(), 0
    states = allowed(log)
    places = [position for position, _ in states]
    first = next(n for n, e in enumerate(log) if isinstance(e, Mark))
    kept = life.chance.randrange(cuts)
    for number, position in enumerate(sorted(life.chance.randint(first, len(log)) for _ in range(cuts))):
        for event in log[at:position]:
            disk.apply(event)
        at = position
        passed = bisect.bisect_left(places, position)
        expected = states[passed - 1][1] if passed else ()
        files = disk.cut(life.chance)
        if number == kept and expected:
            _lay_out(files, start)
        tally.cuts += 1
        tally.promises += sum(len(s) == 1 for _, s in states[:passed])
        tally.fell["inside" if len(expected) != 1 else "between"] += 1
        opened = _lay_out(files, start.with_name("opened"))
        tally.faults += [f"{f} (cut at {position} of {len(log)})" for f in examine(opened, expected, life, tally)]


def _lay_out(files: dict[str, bytes], directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def examine(directory: Path, expected: tuple[str, ...], life: Life, tally: Tally) -> list[str]:
    """Start on what is left. `expected` empty: the first migration had not ended."""
    path = directory / "perennial.db"
    if not expected:
        return _first_start(path)
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.Error as error:
        return [f"lost: {error}"]
    try:
        query: Query = lambda sql: connection.execute(sql).fetchall()  # noqa: E731
        if (said := query("PRAGMA integrity_check")) != [("ok",)] or query("PRAGMA foreign_key_check"):
            return [f"corrupt: {said}"]
        if content(query) not in expected:
            return ["lost: the content is not what was acknowledged"]
        query("BEGIN IMMEDIATE")
        query("UPDATE adapters SET run_after = run_after")
        query("COMMIT")
    except apsw.Error as error:
        return [f"corrupt: {error}"]
    finally:
        connection.close()
    if life.chance.random() < RESTARTS:
        tally.restarts += 1
        return _restart(path, life)
    return []


def _first_start(path: Path) -> list[str]:
    database = Database(f"sqlite:///{path}", sqlite_driver=driver())
    try:
        migrate.migrate(database)
        return ["refused: the schema is not whole"] if migrate.pending(database) else []
    except Exception as error:  # whatever it is, a start must not fail
        return [f"refused: {type(error).__name__}: {error}"]
    finally:
        database.close()


def _restart(path: Path, life: Life) -> list[str]:
    """The product starts, knows what it acknowledged, and takes more."""
    database = Database(f"sqlite:///{path}", sqlite_driver=driver())
    try:
        migrate.migrate(database)
        with database.write() as s:
            tenant = call.tenant(s)
        for name in NAMES:  # an early cut was before they were made
            with suppress(PerennialError), database.write() as s:
                call.create_adapter(s, tenant, name)
        with database.write() as s:
            for key, name, text, batch in life.sent[-1:]:
                known, again = call.submit(s, tenant, name, key, text=text)
                if again and known.id != batch:
                    return ["lost: an idempotency key was forgotten"]
            call.submit(s, tenant, "helper", None)
        with database.write() as s:
            call.expire(s)
            if call.claim(s, "after") is None:
                return ["refused: no work can be claimed"]
            broken = violations(lambda sql: [tuple(r) for r in s.connection().exec_driver_sql(sql).fetchall()])
        return [f"corrupt: {broken}"] if broken else []
    except Exception as error:
        return [f"refused: {type(error).__name__}: {error}"]
    finally:
        database.close()


def check(cuts: int, seed: int, *, journals: Sequence[str] = JOURNALS, **changes: Any) -> Tally:
    """Recordings and cuts until there are enough. `changes`: of Life, for defects that must be noticed."""
    chance, tally = random.Random(seed), Tally()  # noqa: S311 - repeatable, not secret
    place = scratch()
    try:
        while tally.cuts < cuts:
            (live := place / "live").mkdir()
            life = Life(live, chance, journal=chance.choice(journals), **changes)
            if tally.recordings % 5 == 0:  # begin anew: the content grows from life to life
                shutil.rmtree(place / "start", ignore_errors=True)
            record(life, place / "start", STEPS)
            cut_often(life, min(CUTS, cuts - tally.cuts), tally, place / "start")
            shutil.rmtree(live)
            tally.recordings += 1
        return tally
    finally:
        shutil.rmtree(place, ignore_errors=True)


def version_cuts(cuts: int, seed: int) -> dict[str, int]:
    """The same for the directories of versions."""
    place = scratch()
    try:
        counts = version_files.check(place, cuts, seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {kind: counts[kind] for kind in ("cuts", "promises", "lost", "torn")}


def main() -> int:
    parser = argparse.ArgumentParser(description="Cut the power, many times.")
    parser.add_argument("--cuts", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.process_time()
    report = check(arguments.cuts, arguments.seed).report()
    report |= {"versions": version_cuts(arguments.cuts, arguments.seed), "seed": arguments.seed}
    report["cpu_seconds"] = round(time.process_time() - began, 1)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 1 if report["faults"] or report["versions"]["lost"] or report["versions"]["torn"] else 0


if __name__ == "__main__":
    sys.exit(main())
