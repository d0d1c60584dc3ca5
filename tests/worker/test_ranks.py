"""Two training processes on each lease: real supervisor, real ranks (gloo), against a service with behaviour."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from api_schemas.training import LoraSettings
from tests.worker.conftest import WorkerProcess, start_worker
from worker.base_model import load_base
from worker.job import run_job
from worker.messages import Done

pytestmark = pytest.mark.slow  # every test needs processes that load torch

LONG = {"steps": 64, "learning_rate": 1e-5}
BOTH = {"rollouts": "both"}
WEIGHTS = "adapter/adapter_model.safetensors"
Weights = dict[str, torch.Tensor]
TWO = {"PERENNIAL_WORKER_RANKS": "2", "PERENNIAL_WORKER_STOP_GRACE_SECONDS": "30"}


@pytest.fixture(scope="module")
def pair(service: Any, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker of two ranks for all tests that leave it alive; it must survive the death of its ranks."""
    yield from start_worker(service, model_dir, tmp_path_factory.mktemp("log") / "pair.log", **TWO)


@pytest.fixture
def long_job(service: Any, make_item: Any) -> Callable[[str], int]:
    return lambda adapter: service.enqueue(adapter, [make_item(n, words=120) for n in range(12)], training=LONG)


def shorten(service: Any, job: int) -> None:
    service.jobs[job].training = service.jobs[job].training.model_copy(update={"steps": 1})


@pytest.fixture
def alone(
    request: pytest.FixtureRequest,
    model_dir: Path,
    make_lease: Any,
    make_item: Any,
    make_training: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Weights:
    """What one process makes of the items of `ragged`; the parameter is who writes the answers."""
    root = tmp_path_factory.mktemp("alone")
    lease = make_lease(items=0, seed=1, training=make_training(rollouts=request.param)).model_copy(
        update={"items": ragged(make_item)}
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks Transformers 5.23 for a property under its deprecated name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        base = load_base(model_dir, "tiny/base", "cpu", "auto")
        done = run_job(lease, base, root, report=lambda _: None, should_stop=lambda: False)
    assert isinstance(done, Done)
    return load_file(root / done.uri / WEIGHTS)


def ragged(make_item: Any, *, standing: bool = True) -> list[Any]:
    return [make_item(n, words=3 + 5 * n, standing=standing) for n in range(5)]


def close(found: Weights, expected: Weights) -> None:
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alone", ["both"], indirect=True)
def test_two_ranks_write_the_version_that_one_writes(
    pair: WorkerProcess, service: Any, make_item: Any, alone: Weights
) -> None:
    made = []
    for adapter in ("adp_pair_a", "adp_pair_b"):
        done = service.wait_for_state(service.enqueue(adapter, ragged(make_item), training=BOTH), "succeeded")
        made.append(service.root / done.commit.uri / WEIGHTS)
        assert done.commit.standing_feedback == ["in capitals, please"]
        assert [m.step for m in done.commit.metrics] == [1, 2]
    close(load_file(made[0]), alone)
    assert made[0].read_bytes() == made[1].read_bytes(), "the same lease and as many ranks: the same bytes"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_loses_nothing(
    pair: WorkerProcess, service: Any, long_job: Any, wait_for_exit: Any, rank: int
) -> None:
    job = long_job(f"adp_rank_{rank}")
    lost = service.wait_for_steps(job).run_id
    ranks = pair.children()
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    failed = service.wait_for_state(job, "failed")
    assert (failed.error["code"], failed.error["retryable"]) == ("trainer_died", True)
    assert "SIGKILL" in failed.error["message"]
    for pid in ranks:
        wait_for_exit(pid)
    assert list(service.root.glob(f"adp_rank_{rank}/*")) == []
    shorten(service, job)
    service.jobs[job].state = "queued"  # as the service does after its pause
    with service.changed:
        service.changed.notify_all()
    done = service.wait_for_state(job, "succeeded")
    assert done.run_id != lost
    assert [v.uri for v in service.heads[f"adp_rank_{rank}"].versions] == [done.commit.uri]


def test_a_cancelled_job_stops_both_between_steps(pair: WorkerProcess, service: Any, long_job: Any) -> None:
    job = long_job("adp_ranks_cancel")
    service.wait_for_steps(job)
    before = pair.children()
    service.cancel.add(job)
    service.wait_for_state(job, "cancelled")
    service.wait_for_state(service.enqueue("adp_ranks_after", items=1), "succeeded")
    assert pair.children() == before, "the base models stay resident"
    assert service.jobs[job].commit is None


def test_a_refused_job_leaves_both_alive(pair: WorkerProcess, service: Any) -> None:
    before = pair.children()
    nowhere = LoraSettings(rank=4, alpha=8, target_modules=["nowhere"])
    failed = service.wait_for_state(service.enqueue("adp_ranks_bad", lora=nowhere), "failed")
    assert failed.error["code"] == "adapter_refused"
    service.wait_for_state(service.enqueue("adp_ranks_good", items=3), "succeeded")
    assert pair.children() == before


def test_a_shutdown_mid_training_leaves_no_process(
    pair: WorkerProcess, service: Any, long_job: Any, wait_for_exit: Any
) -> None:
    """The last test of the pair."""
    job = long_job("adp_ranks_term")
    service.wait_for_steps(job)
    ranks = pair.children()
    assert pair.stop(signal.SIGTERM) == 0
    for pid in ranks:
        wait_for_exit(pid)
    assert service.jobs[job].state == "released"


@pytest.mark.parametrize("alone", ["own"], indirect=True)
def test_a_sharded_base_trains_the_same_and_a_frozen_rank_is_ended(
    service: Any, another_worker: Any, long_job: Any, make_item: Any, alone: Weights, wait_for_exit: Any
) -> None:
    # Far more than a busy machine takes between two words of a healthy trainer.
    stalls = {"PERENNIAL_WORKER_STALL_SECONDS": "20", "PERENNIAL_WORKER_SHARD": "true"}
    worker = another_worker(**TWO | stalls)
    done = service.wait_for_state(service.enqueue("adp_shards", ragged(make_item, standing=False)), "succeeded")
    close(load_file(service.root / done.commit.uri / WEIGHTS), alone)
    shown = service.wait_for_state(service.enqueue("adp_shards", items=1, kind="preview"), "succeeded")
    assert shown.preview is not None
    job = long_job("adp_shards_stuck")
    service.wait_for_steps(job)
    ranks = worker.children()
    os.kill(ranks[1], signal.SIGSTOP)
    failed = service.wait_for_state(job, "failed")
    assert (failed.error["code"], failed.error["retryable"]) == ("trainer_stalled", True)
    for pid in ranks:
        wait_for_exit(pid)
    assert list(service.root.glob("adp_shards_stuck/*")) == []
