"""A worker that holds several leases at once: what happens to one happens to that one alone, as far as can be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LONG = {"steps": 64, "learning_rate": 1e-5}
SEVERAL = {"PERENNIAL_WORKER_LEASES_AT_ONCE": "3"}


@pytest.fixture(scope="module")
def several(service: Any, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.worker.conftest import start_worker

    yield from start_worker(service, model_dir, tmp_path_factory.mktemp("log") / "worker.log", **SEVERAL)


@pytest.fixture
def enqueue(service: Any, make_item: Any) -> Callable[..., list[int]]:
    """Jobs that become ready in the same moment: long ones first."""

    def put(name: str, *, long: int = 0, short: int = 0) -> list[int]:
        items = [make_item(n, words=120) for n in range(12)]
        with service.changed:
            first = [service.enqueue(f"adp_{name}_{n}", items, training=LONG) for n in range(long)]
            return first + [service.enqueue(f"adp_{name}_{long + n}") for n in range(short)]

    return put


def versions(service: Any, job: int) -> list[str]:
    return [v.uri for v in service.heads[service.jobs[job].adapter_id].versions]


def held(service: Any, jobs: list[int]) -> None:
    service.wait(lambda: all(service.jobs[j].state == "running" for j in jobs), f"{jobs} are not held together")


def test_three_adapters_are_trained_in_one_round(several: Any, service: Any, enqueue: Any) -> None:
    jobs = enqueue("round", short=4)
    done = [service.wait_for_state(job, "succeeded") for job in jobs]
    order = [call for call in service.calls if call in {f"commit {job.run_id}" for job in done}]
    assert order == [f"commit {job.run_id}" for job in done], "in the order of their leases"
    leased = [several.log.index(f"{job.run_id}: leased for") for job in done]
    committed = [several.log.index(f"{job.run_id}: committed as") for job in done[:3]]
    assert max(leased[:3]) < min(committed), "three were held together"
    assert leased[3] > max(committed), "the fourth was not"
    assert [m.step for m in done[2].commit.metrics] == [1, 2]
    for job in jobs:
        assert versions(service, job) == [service.jobs[job].commit.uri]


def test_a_killed_trainer_fails_all_that_it_held_and_each_is_done_once(
    several: Any, service: Any, enqueue: Any
) -> None:
    jobs = enqueue("kill", long=2)
    held(service, jobs)
    service.wait_for_steps(jobs[0])
    [trainer] = several.children()
    os.kill(trainer, signal.SIGKILL)
    for job in jobs:
        failed = service.wait_for_state(job, "failed")
        assert (failed.error["code"], failed.error["retryable"]) == ("trainer_died", True)
    with service.changed:  # the retry, as the service gives it
        for job in jobs:
            retried = service.jobs[job]
            retried.training, retried.state = retried.training.model_copy(update={"steps": 1}), "queued"
        service.changed.notify_all()
    for job in jobs:
        done = service.wait_for_state(job, "succeeded")
        assert versions(service, job) == [done.commit.uri]
        assert {p.name for p in (service.root / done.adapter_id).iterdir()} == {done.run_id}


def test_a_waiting_job_is_cancelled_alone(several: Any, service: Any, enqueue: Any) -> None:
    """And one that has lost its lease is dropped alone; the one in training goes on."""
    trained, cancelled, lost = jobs = enqueue("cancel", long=1, short=2)
    held(service, jobs)
    service.wait_for_steps(trained)
    trainers, runs = several.children(), [service.jobs[j].run_id for j in jobs]
    service.cancel.add(cancelled)
    service.fence(lost)
    service.wait_for_state(cancelled, "cancelled")
    beats = len(service.jobs[trained].beats)
    service.wait(lambda: len(service.jobs[trained].beats) > beats, "the one in training did not go on")
    service.cancel.add(trained)
    [after] = enqueue("after_cancel", short=1)
    service.wait_for_state(after, "succeeded")
    assert several.children() == trainers, "nobody needed a kill"
    assert not {f"commit {run}" for run in runs[1:]} & set(service.calls)
    assert [list((service.root / service.jobs[j].adapter_id).glob("*")) for j in jobs[1:]] == [[], []]


def test_cancelling_the_one_in_training_lets_the_next_begin(several: Any, service: Any, enqueue: Any) -> None:
    cancelled, following = enqueue("next", long=1, short=1)
    held(service, [cancelled, following])
    service.wait_for_steps(cancelled)
    service.cancel.add(cancelled)
    assert len(service.wait_for_state(following, "succeeded").commit.metrics) == 2
    assert service.jobs[cancelled].state == "cancelled"
    assert service.jobs[following].attempts == 0


@pytest.mark.slow
def test_a_shutdown_hands_all_of_them_back(service: Any, another_worker: Any, enqueue: Any, several: Any) -> None:
    several.stop()
    worker = another_worker(**SEVERAL)
    jobs = enqueue("term", long=2)
    held(service, jobs)
    service.wait_for_steps(jobs[0])
    assert worker.stop(signal.SIGTERM) == 0
    assert [service.jobs[j].state for j in jobs] == ["released", "released"]
    assert [list((service.root / service.jobs[j].adapter_id).glob("*")) for j in jobs] == [[], []]


@pytest.mark.slow
def test_a_kill_for_one_run_costs_the_others_no_attempt(
    service: Any, another_worker: Any, enqueue: Any, wait_for_exit: Callable[[int], None]
) -> None:
    """One that does not heed its cancellation is killed; what waited behind it goes back to the queue."""
    worker = another_worker(**SEVERAL)
    deaf, waiting = enqueue("deaf", long=1, short=1)
    held(service, [deaf, waiting])
    service.wait_for_steps(deaf)
    [trainer] = worker.children()
    os.kill(trainer, signal.SIGSTOP)
    service.cancel.add(deaf)
    wait_for_exit(trainer)
    service.wait_for_state(waiting, "released")
    assert (service.jobs[waiting].attempts, service.jobs[waiting].releases) == (0, 1)
    assert service.jobs[deaf].state == "cancelled"
