"""Signals, crashes and freezes of real worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # every test starts processes that load torch

LONG = {"steps": 64, "learning_rate": 1e-5}


@pytest.fixture
def long_job(service: Any, make_item: Any) -> Callable[[str], int]:
    """Queue a job that outlasts any test that interrupts it."""
    return lambda adapter: service.enqueue(adapter, [make_item(n, words=120) for n in range(12)], training=LONG)


def test_sigterm_hands_the_lease_back(service: Any, another_worker: Any, long_job: Any, wait_for_exit: Any) -> None:
    worker = another_worker()
    job = long_job("adp_term")
    service.wait_for_steps(job)
    [trainer] = worker.children()
    assert worker.stop(signal.SIGTERM) == 0
    wait_for_exit(trainer)
    assert service.jobs[job].state == "released"
    assert list(service.root.glob("adp_term/*")) == []


def test_an_idle_worker_stops_at_once(service: Any, another_worker: Any) -> None:
    worker = another_worker()
    service.wait_for_state(service.enqueue("adp_idle"), "succeeded")
    assert worker.stop(signal.SIGINT) == 0
    assert "released" not in worker.log
    assert "the worker has ended its training process" in worker.log
    assert "SIGKILL" not in worker.log, "nothing went wrong: nobody need look for memory"


def test_a_killed_supervisor_takes_its_trainer_along_and_the_job_is_done_once(
    service: Any, another_worker: Any, long_job: Any, wait_for_exit: Any
) -> None:
    first = another_worker()
    job = long_job("adp_kill")
    lost = service.wait_for_steps(job).run_id
    [trainer] = first.children()
    first.stop(signal.SIGKILL)
    wait_for_exit(trainer)
    service.jobs[job].training = service.jobs[job].training.model_copy(update={"steps": 1})
    another_worker()
    done = service.wait_for_state(job, "succeeded")
    assert done.run_id != lost
    assert [v.uri for v in service.heads["adp_kill"].versions] == [done.commit.uri]
    assert [p.name for p in (service.root / "adp_kill").iterdir()] == [done.run_id]


def test_a_frozen_worker_wakes_up_fenced(service: Any, another_worker: Any, long_job: Any, wait_for_exit: Any) -> None:
    frozen = another_worker()
    job = long_job("adp_freeze")
    asleep = service.wait_for_steps(job).run_id
    [trainer] = frozen.children()
    for pid in (frozen.process.pid, trainer):
        os.kill(pid, signal.SIGSTOP)
    service.jobs[job].training = service.jobs[job].training.model_copy(update={"steps": 1})
    other = another_worker()
    done = service.wait_for_state(job, "succeeded")
    assert other.stop() == 0
    for pid in (frozen.process.pid, trainer):
        os.kill(pid, signal.SIGCONT)
    wait_for_exit(trainer)  # its next heartbeat says that the lease is lost
    service.wait_for_state(service.enqueue("adp_thawed"), "succeeded")
    assert [v.uri for v in service.heads["adp_freeze"].versions] == [done.commit.uri]
    assert f"commit {asleep}" not in service.calls


def test_a_wrong_token_ends_the_worker_with_a_reason(service: Any, another_worker: Any) -> None:
    worker = another_worker(token="not-the-token")
    assert worker.process.wait(60) == 3
    assert "does not take this worker" in worker.log
    assert "not-the-token" not in worker.log


def test_a_base_model_that_cannot_be_loaded_leases_nothing(service: Any, tmp_path: Path, make_worker: Any) -> None:
    job = service.enqueue("adp_nobase")
    worker = make_worker(tmp_path / "no-model-here")
    assert worker.process.wait(60) == 1
    assert "base model could not be loaded" in worker.log
    assert service.jobs[job].state == "queued"
    service.jobs[job].state = "withdrawn"


def test_a_stuck_trainer_is_replaced(service: Any, another_worker: Any, long_job: Any) -> None:
    # Far more than a busy machine takes between two words of a healthy trainer.
    worker = another_worker(PERENNIAL_WORKER_STALL_SECONDS="15")
    job = long_job("adp_stuck")
    service.wait_for_steps(job)
    [trainer] = worker.children()
    os.kill(trainer, signal.SIGSTOP)
    failed = service.wait_for_state(job, "failed")
    assert (failed.error["code"], failed.error["retryable"]) == ("trainer_stalled", True)
    service.wait_for_state(service.enqueue("adp_unstuck"), "succeeded")


def test_an_outage_within_the_patience_costs_nothing(service: Any, another_worker: Any, long_job: Any) -> None:
    another_worker()
    job = long_job("adp_outage")
    run_id = service.wait_for_steps(job).run_id
    service.unavailable = 6
    service.wait(lambda: service.unavailable == 0)
    beats = len(service.jobs[job].beats)
    service.wait(lambda: len(service.jobs[job].beats) > beats, "no heartbeat after the outage")
    assert service.jobs[job].run_id == run_id
    service.fence(job)


def test_an_outage_beyond_the_patience_ends_the_run(
    service: Any, another_worker: Any, long_job: Any, wait_for_exit: Any
) -> None:
    worker = another_worker(PERENNIAL_WORKER_OUTAGE_PATIENCE_SECONDS="0.5")
    job = long_job("adp_silence")
    service.wait_for_steps(job)
    [trainer] = worker.children()
    service.unavailable = 1_000_000
    wait_for_exit(trainer)
    service.jobs[job].training = service.jobs[job].training.model_copy(update={"steps": 1})
    service.unavailable = 0
    service.wait_for_state(job, "succeeded")
    assert len(service.heads["adp_silence"].versions) == 1
