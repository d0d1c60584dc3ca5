"""A share of `make check-model`, and that the search finds what is wrong."""

from __future__ import annotations

from tests.durability.model.database import Store
from tests.durability.model.explore import explore
from tests.durability.model.system import Bounds, Machine


def test_every_interleaving_within_small_bounds() -> None:
    found = explore(Bounds(jobs=1, workers=2, publishers=1, tokens=3, adversity=2), 100_000)
    assert found["violation"] is None
    assert found["complete"]
    assert found["states"] > 2000


class Forgetful(Machine):
    """A service that forgets a commit which it has acknowledged."""

    def _commit(self, s, token):  # type: ignore[no-untyped-def]
        _, result = super()._commit(s, token)
        return s.db, result


def test_a_forgotten_commit_is_found_by_the_shortest_way() -> None:
    found = explore(Bounds(jobs=1, workers=1, publishers=1, adversity=0), 1000, machine=Forgetful)
    assert found["violation"] == {
        "what": "an acknowledged commit is not there",
        "way": ["submit", "w0 claims 1", "w0 writes 1", "after w0 commits 1"],
    }


def test_a_call_is_run_once_and_names_do_not_depend_on_chance() -> None:
    first, second = Store(), Store()
    try:
        for store in (first, second):
            machine = Machine(store, Bounds())
            state = machine.start()
            for _ in range(2):
                list(machine.steps(state))
        assert first.states == second.states
        assert first.calls == second.calls
    finally:
        first.close()
        second.close()
