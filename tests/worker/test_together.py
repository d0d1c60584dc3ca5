"""Passes through the frozen base that several leases share: each is given what it would have had alone."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_core.bare import BarePolicy
from sdpo_core.errors import AdapterError
from sdpo_core.lora import LoraSpec, attached
from sdpo_core.samples import token_batch
from worker.ahead import Ahead
from worker.base_model import BaseModel, load_base
from worker.errors import TrainingFailedError
from worker.job import run_job
from worker.messages import Progress, Train
from worker.together import gathered, shared_ahead
from worker.versions import version_digest


@dataclass
class OneTask:
    train: Train
    stop: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    """A third of its tokens end a turn, so that what it writes is of many lengths."""
    with warnings.catch_warnings():
        loaded = load_base(model_dir, "tiny/base", "cpu", "auto")
    config: Any = loaded.module.generation_config
    config.eos_token_id = list(range(0, len(loaded.tokenizer), 3))
    return loaded


@pytest.fixture
def leases(make_lease: Any, make_item: Any, make_training: Any) -> list[Any]:
    """Five that differ in what may be shared: length of answers, K, path, who writes, whether the distance is told."""
    both = {"rollouts": "both"}
    settings = [both, both, both | {"top_k": 7}, both | {"path": "plain"}, {"measure_base_kl": False}]
    return [
        make_lease(
            f"adp_{n}", run_id=f"run_{n}", seed=n, training=make_training(**given),
            items=0, standing_feedback=["say so"] * (n % 2),
        ).model_copy(update={"items": [make_item(i, words=2 + 3 * n + i) for i in range(2)]})
        for n, given in enumerate(settings)
    ]  # fmt: skip


def tasks_of(leases: list[Any]) -> list[OneTask]:
    return [OneTask(Train(lease=lease)) for lease in leases]


def run(lease: Any, base: BaseModel, root: Path, ahead: Ahead | None = None) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        done = run_job(lease, base, root, report=lambda _: None, should_stop=lambda: False, ahead=ahead)
    return version_digest(done.files)


def test_a_version_does_not_depend_on_who_shared_the_pass(base: BaseModel, leases: list[Any], tmp_path: Path) -> None:
    """Bit for bit on this CPU and these shapes; what rounding may do elsewhere is in docs/speed.md."""
    heard: list[Progress] = []
    shared = shared_ahead(tasks_of(leases), base, heard.append)
    assert set(shared) == {lease.run_id for lease in leases}
    assert {p.run_id for p in heard if p.phase == "answering"} == {"run_0", "run_1", "run_2", "run_3"}
    written = [sum(s.teacher_written for s in shared[lease.run_id].learnt) for lease in leases]
    assert sum(written[:4]) >= 4, "otherwise this says nothing about what the teacher writes"
    assert written[4] == 0
    assert [shared[lease.run_id].anchors is None for lease in leases] == [False] * 4 + [True]
    alone = [run(lease, base, tmp_path / "alone") for lease in leases]
    together = [run(lease, base, tmp_path / "together", shared[lease.run_id]) for lease in leases]
    assert alone == together


def test_what_is_wrong_with_one_is_found_when_it_is_alone(
    base: BaseModel, leases: list[Any], make_item: Any, tmp_path: Path
) -> None:
    bad = leases[1].model_copy(update={"items": [make_item(1, feedback="x" * 2000)]})
    assert shared_ahead(tasks_of([leases[0], bad]), base, lambda _: None) == {}
    with pytest.raises(TrainingFailedError) as caught:
        run(bad, base, tmp_path)
    assert caught.value.code == "context_too_long"
    run(leases[0], base, tmp_path)


def test_previews_and_single_leases_share_nothing(base: BaseModel, leases: list[Any]) -> None:
    preview = leases[0].model_copy(update={"kind": "preview"})
    elsewhere = leases[1].model_copy(update={"base_model": "another/base"})
    assert shared_ahead(tasks_of([leases[2], preview, elsewhere]), base, lambda _: None) == {}


def test_a_stop_of_all_ends_the_pass_and_a_stop_of_one_does_not(base: BaseModel, leases: list[Any]) -> None:
    tasks = tasks_of(leases[:2])
    tasks[0].stop.set()
    assert len(shared_ahead(tasks, base, lambda _: None)) == 2
    tasks[1].stop.set()
    assert shared_ahead(tasks, base, lambda _: None) == {}


def test_only_what_comes_right_behind_is_waited_for() -> None:
    tasks: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(4):
        tasks.put(number)
    assert gathered(tasks, 1) == [0], "alone without a wait"
    assert gathered(tasks, 2) == [1, 2]
    began = time.monotonic()
    assert gathered(tasks, 8) == [3]
    assert time.monotonic() - began < 30


def test_the_bare_base_answers_as_an_adapter_that_is_off(base: BaseModel) -> None:
    bare = base.bare()
    batch = token_batch([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], bare.device)
    before, wrote = bare.logits(batch, adapter=False), bare.write([[5, 6], [7]], 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        with attached(base.module, LoraSpec(rank=2)) as policy:
            assert torch.equal(policy.logits(batch, adapter=False), before)
            assert policy.write([[5, 6], [7]], 5) == wrote
            assert policy.base_seal is not None
            assert all(map(torch.equal, policy.base_seal, bare.base_seal))
    asked: list[Callable[[BarePolicy], Any]] = [
        lambda p: p.logits(batch, adapter=True), lambda p: p.delta_hidden(None, {}),  # type: ignore[arg-type]
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(AdapterError) as caught:
            ask(bare)
        assert caught.value.code == "no_adapter"
