"""The whole protocol as a state machine: clients, workers, publishers, wires and the clock around the real store.

A state of the system is the database's (`database`) and what everyone else knows. What others do is modelled on
worker.attempt and service.serving.publisher, message by message; what the store does is not modelled but run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.errors import LeaseLost, PerennialError
from tests.durability import store_calls as call
from tests.durability.model.database import EXPIRED, TENANT, Store

NAME = "a"
ADAPTER = f"adp_{NAME}"


class Worker(NamedTuple):
    """One lease as its worker sees it. `sent`: a commit has gone out, so the files are not the worker's any more."""

    token: int
    trained: bool = False
    sent: bool = False


class System(NamedTuple):
    db: int
    workers: tuple[Worker | None, ...]
    publishers: tuple[int | None, ...]
    """The head that each publisher has seen and had loaded, about to decide on it."""
    wire: frozenset[int]
    """Commits under these tokens are under way and may arrive at any time, or never."""
    files: frozenset[int]
    """Version directories, by the token of their run."""
    submitted: int
    acknowledged: frozenset[int]
    """Tokens of commits whose worker has heard that they are done."""
    adversity: int
    """How many things may still go wrong or be asked for: crashes, lost messages, failures, cancels, rejections."""


@dataclass(frozen=True)
class Bounds:
    jobs: int = 2
    workers: int = 2
    publishers: int = 2
    tokens: int = 5
    """Most leases of the adapter."""
    adversity: int = 3


class Violation(AssertionError):
    """The protocol does not hold; the message says what, the trace says how it came about."""


class Machine:
    def __init__(self, store: Store, bounds: Bounds) -> None:
        self._store, self._bounds = store, bounds
        self._tenant = TENANT

    def start(self) -> System:
        db, _ = self._store.call(0, "create", lambda s: call.create_adapter(s, self._tenant, NAME).id)
        b = self._bounds
        nobody = (None,) * b.workers
        return System(db, nobody, (None,) * b.publishers, frozenset(), frozenset(), 0, frozenset(), b.adversity)

    def steps(self, s: System) -> Iterator[tuple[str, System]]:
        """Everything that may happen next. Raises Violation."""
        yield from self._clients(s)
        for i in range(len(s.workers)):
            yield from self._idle(s, i) if s.workers[i] is None else self._busy(s, i)
        yield from self._late(s)
        for i in range(len(s.publishers)):
            yield from self._publisher(s, i)
        if self._view(s)["lease_until"] is not None and self._view(s)["lease_until"] != EXPIRED:
            yield "lease expires", s._replace(db=self._call(s, "expire", call.expire)[0])

    def _call(self, s: System, key: Any, work: Any) -> tuple[int, Any]:
        return self._store.call(s.db, key, work)

    def _view(self, s: System) -> dict[str, Any]:
        return self._store.adapter(s.db)

    def _clients(self, s: System) -> Iterator[tuple[str, System]]:
        if s.submitted < self._bounds.jobs:
            yield "submit", self._submit(s, s.submitted)._replace(submitted=s.submitted + 1)
        if s.submitted and self._submit(s, s.submitted - 1).db != s.db:
            raise Violation("an idempotency key was forgotten")
        if not s.adversity:
            return
        less = s._replace(adversity=s.adversity - 1)
        for job, state in self._store.jobs(s.db):
            if state in ("queued", "running"):
                yield (
                    f"cancel {job}",
                    less._replace(db=self._call(s, ("cancel", job), lambda t, j=job: call.cancel(t, j))[0]),
                )
            if state == "failed":
                yield (
                    f"requeue {job}",
                    less._replace(db=self._call(s, ("requeue", job), lambda t, j=job: call.requeue(t, j))[0]),
                )
        for n in range(1, self._view(s)["next_n"]):
            db, result = self._call(s, ("promote", n), lambda t, n=n: call.promote(t, ADAPTER, n))
            if not isinstance(result, PerennialError):
                yield f"promote {n}", less._replace(db=db)

    def _submit(self, s: System, number: int) -> System:
        key = f"k{number}"
        return s._replace(db=self._call(s, ("submit", key), lambda t: call.submit(t, self._tenant, NAME, key)[0].id)[0])

    def _idle(self, s: System, i: int) -> Iterator[tuple[str, System]]:
        view = self._view(s)
        if view["token"] >= self._bounds.tokens:
            return
        db, token = self._call(s, "claim", lambda t: lease.token if (lease := call.claim(t, "w")) else None)
        if token is None:
            if view["open_jobs"] and view["lease_until"] in (None, EXPIRED) and db == s.db:
                raise Violation("there is work, nobody holds it, and it is not given out")
            return
        if token <= view["token"]:
            raise Violation("the fencing token did not grow")
        yield f"w{i} claims {token}", self._with(s._replace(db=db), i, Worker(token))
        if s.adversity:
            yield f"w{i} claims {token}, unheard", s._replace(db=db, adversity=s.adversity - 1)

    def _busy(self, s: System, i: int) -> Iterator[tuple[str, System]]:
        me = s.workers[i]
        assert me is not None
        yield from self._beats(s, i, me)
        if not me.trained:
            yield (
                f"w{i} writes {me.token}",
                self._with(s._replace(files=s.files | {me.token}), i, me._replace(trained=True)),
            )
        else:
            yield from self._commits(s, i, me)
        if not s.adversity:
            return
        less = s._replace(adversity=s.adversity - 1)
        yield f"w{i} crashes", self._with(less, i, None)
        if not me.sent:
            for key, work in (
                ("fail", lambda t: call.fail(t, _run(me.token), me.token, retryable=True)),
                ("give up", lambda t: call.fail(t, _run(me.token), me.token, retryable=False)),
                ("release", lambda t: call.release(t, _run(me.token), me.token)),
            ):
                db, _ = self._call(s, (key, me.token), work)
                yield f"w{i} {key}", self._gone(less._replace(db=db), i, me)

    def _beats(self, s: System, i: int, me: Worker) -> Iterator[tuple[str, System]]:
        db, result = self._call(s, ("beat", me.token), lambda t: call.heartbeat(t, _run(me.token), me.token))
        if isinstance(result, LeaseLost):
            yield f"w{i} hears that {me.token} is lost", self._gone(s, i, me)
        elif db != s.db:
            yield f"w{i} beats", s._replace(db=db)

    def _commits(self, s: System, i: int, me: Worker) -> Iterator[tuple[str, System]]:
        db, result = self._commit(s, me.token)
        if isinstance(result, PerennialError):
            yield f"w{i} commits {me.token}, refused", self._gone(s, i, me)
        else:
            done = s._replace(db=db, acknowledged=s.acknowledged | {me.token})
            yield f"w{i} commits {me.token}", self._with(done, i, None)
        if s.adversity:
            sent = self._with(s._replace(adversity=s.adversity - 1), i, me._replace(sent=True))
            yield f"w{i} commits {me.token}, unheard", sent._replace(db=db)
            yield f"w{i} sends {me.token}, delayed", sent._replace(wire=s.wire | {me.token})

    def _late(self, s: System) -> Iterator[tuple[str, System]]:
        for token in s.wire:
            yield f"commit {token} arrives late", s._replace(db=self._commit(s, token)[0], wire=s.wire - {token})

    def _commit(self, s: System, token: int) -> tuple[int, Any]:
        """As service.routes.worker commits: the files are looked at first."""
        if token not in s.files:
            return s.db, LeaseLost("the service finds no files")
        return self._call(s, ("commit", token), lambda t: call.commit(t, _run(token), token, ADAPTER).n)

    def _publisher(self, s: System, i: int) -> Iterator[tuple[str, System]]:
        view, seen = self._view(s), s.publishers[i]
        if seen is None:
            if view["head_n"] != view["live_n"]:
                yield f"p{i} loads {view['head_n']}", s._replace(publishers=_put(s.publishers, i, view["head_n"]))
            return
        rest = s._replace(publishers=_put(s.publishers, i, None))
        db, _ = self._call(s, ("publish", seen), lambda t: call.publish(t, ADAPTER, seen))
        yield f"p{i} publishes {seen}", rest._replace(db=db)
        if s.adversity and seen:
            db, _ = self._call(s, ("reject", seen), lambda t: call.reject(t, ADAPTER, seen))
            yield f"p{i} rejects {seen}", rest._replace(db=db, adversity=s.adversity - 1)

    def _with(self, s: System, i: int, worker: Worker | None) -> System:
        return s._replace(workers=_put(s.workers, i, worker))

    def _gone(self, s: System, i: int, me: Worker) -> System:
        """The worker gives its run up, and removes the files unless a commit of theirs may be under way."""
        return self._with(s if me.sent else s._replace(files=s.files - {me.token}), i, None)

    def check(self, before: System, after: System) -> None:
        """What must hold of every state, and of every step. (The store's rows are checked when they are read.)"""
        if after.db == before.db and after.files == before.files and after.acknowledged == before.acknowledged:
            return
        was, now = self._store.versions(before.db), self._store.versions(after.db)
        if now[: len(was)] != was:
            raise Violation("a version changed or went away")
        made_by = {token for _, _, token in now}
        if not made_by <= after.files:
            raise Violation("a committed version lost its files")
        if not after.acknowledged <= made_by:
            raise Violation("an acknowledged commit is not there")
        if len(self._store.jobs(after.db)) != after.submitted:
            raise Violation("acknowledged feedback is not there")
        if self._view(after)["token"] < self._view(before)["token"]:
            raise Violation("the fencing token went back")


def _run(token: int) -> str:
    return f"run_{NAME}_{token}"


def _put(values: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*values[:i], value, *values[i + 1 :])
