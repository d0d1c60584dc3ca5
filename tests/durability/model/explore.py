"""Breadth-first search through the states of the system."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from typing import Any

from tests.durability.model.database import Store
from tests.durability.model.system import Bounds, Machine, System, Violation


class Packed:
    """States as one number each: a million of them fit into memory. No two states share a number."""

    def __init__(self) -> None:
        self._seen: list[dict[Any, int]] = [{} for _ in System._fields]
        self._fresh = [count() for _ in System._fields]

    def __call__(self, state: System) -> int:
        number = 0
        for value, seen in zip(state, self._seen, strict=True):
            number = number << 24 | seen.setdefault(value, len(seen))
        return number


def explore(bounds: Bounds, most: int, machine: type[Machine] = Machine) -> dict[str, Any]:
    """All states within the bounds, or the first `most`. Stops at the first violation and tells the way to it."""
    store = Store()
    try:
        return _search(machine(store, bounds), store, most) | {"bounds": asdict(bounds)}
    finally:
        store.close()


def _search(machine: Machine, store: Store, most: int) -> dict[str, Any]:
    packed, start = Packed(), machine.start()
    came: dict[int, tuple[int, str]] = {packed(start): (0, "start")}
    todo, transitions, violation = deque([start]), 0, None
    while todo and len(came) < most and violation is None:
        state = todo.popleft()
        step = "?"
        try:
            for step, after in machine.steps(state):
                transitions += 1
                number = packed(after)
                if number not in came:
                    machine.check(state, after)
                    came[number] = (packed(state), step)
                    todo.append(after)
        except AssertionError as error:
            kind = "" if isinstance(error, Violation) else "the database: "
            violation = {"what": f"{kind}{error}", "way": [*_way(came, packed(state)), f"after {step}"]}
    return {
        "states": len(came), "transitions": transitions, "database_states": len(store.states), "calls": store.calls,
        "complete": not todo, "violation": violation,
    }  # fmt: skip


def _way(came: dict[int, tuple[int, str]], number: int) -> Iterable[str]:
    steps = []
    while came[number][1] != "start":
        number, step = came[number]
        steps.append(step)
    return reversed(steps)
