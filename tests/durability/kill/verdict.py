"""What must have become of acknowledged feedback, asked of the database, the files and the served answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from service.db.engine import Database
from tests.durability.invariants import violations
from worker.versions import directory_of, scan, version_digest


def rows(s: Session, sql: str, **values: Any) -> list[Mapping[str, Any]]:
    return [dict(row) for row in s.execute(text(sql), values).mappings()]


def settled(database: Database) -> bool:
    """Nothing is open, and every alias has followed its head."""
    with database.read() as s:
        return not rows(s, "SELECT id FROM adapters WHERE open_jobs > 0 OR head_n <> live_n")


def faults(database: Database, root: Path, sent: Mapping[str, str]) -> Counter[str]:
    """`sent`: batch id -> adapter's name, of everything that was acknowledged, in the order of acknowledgement."""
    found: Counter[str] = Counter()
    with database.read() as s:
        for broken in violations(lambda sql: [tuple(row) for row in s.execute(text(sql)).all()]):
            found["broken"] += 1
            found[f"rule: {broken}"] += 1
        states = {r["batch_id"]: r["state"] for r in rows(s, "SELECT batch_id, state FROM jobs")}
        found["lost"] = sum(states.get(batch) != "succeeded" for batch in sent)
        for adapter in rows(s, "SELECT id, name, head_n, live_n FROM adapters"):
            learnt = _line(s, adapter["id"], adapter["head_n"], root, found)
            times = Counter(learnt)
            wanted = [batch for batch, name in sent.items() if name == adapter["name"]]
            found["lost"] += sum(times[batch] == 0 for batch in wanted if states.get(batch) == "succeeded")
            found["twice"] += sum(times[batch] > 1 for batch in wanted)
            found["out_of_order"] += [b for b in dict.fromkeys(learnt) if b in set(wanted)] != wanted
            found["alias"] += adapter["live_n"] != adapter["head_n"]
    return found


def _line(s: Session, adapter_id: str, n: int, root: Path, found: Counter[str]) -> list[str]:
    """The batches that the head learnt from, oldest first, as its ancestors' own files say. Each file is verified."""
    learnt: list[str] = []
    while n:
        version = rows(s, "SELECT * FROM versions WHERE adapter_id = :a AND n = :n", a=adapter_id, n=n)[0]
        directory = directory_of(root, version["uri"])
        try:
            right = version_digest(scan(directory)) == version["digest"]
            made = json.loads((directory / "adapter" / "perennial.json").read_bytes())
        except OSError:
            right, made = False, {"batch_ids": [], "parent": None}
        found["digest"] += not right
        found["parent"] += (made["parent"] or {"version": 0})["version"] != version["parent_n"] or (
            version["parent_n"] != n - 1
        )
        learnt = made["batch_ids"] + learnt
        n = version["parent_n"]
    return learnt
