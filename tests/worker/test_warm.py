"""Versions kept in memory: a job makes the same bytes of them as of the files, and files that were touched are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api_schemas.worker import ParentVersion
from worker.base_model import BaseModel, load_base
from worker.errors import StoppedError, TrainingFailedError
from worker.job import run_job
from worker.messages import Done
from worker.versions import version_digest
from worker.warm import WarmVersions

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def bases(model_dir: Path) -> dict[str, BaseModel]:
    with warnings.catch_warnings():
        return {dtype: load_base(model_dir, "tiny/base", "cpu", dtype) for dtype in ("float32", "bfloat16")}


def run(base: BaseModel, root: Path, lease: Any, stop: Callable[[], bool] = lambda: False) -> Done:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return run_job(lease, base, root, report=lambda _: None, should_stop=stop)


def warmed(base: BaseModel, most_bytes: int = 1 << 24) -> BaseModel:
    return replace(base, warm=WarmVersions(most_bytes))


def parent_of(done: Done, version: int = 1) -> ParentVersion:
    return ParentVersion(version=version, uri=done.uri, digest=version_digest(done.files))


@pytest.mark.parametrize(
    ("dtype", "settings"), [("float32", {}), ("bfloat16", {}), ("float32", {"preset": "lasgroup", "outside": "tail"})]
)
def test_warm_and_cold_give_the_same_bytes(
    bases: dict[str, BaseModel], make_lease: Any, make_training: Any, tmp_path: Path, dtype: str, settings: Any
) -> None:
    """Three versions in a row, moments and moving average included."""
    chains = []
    for place, base in (("cold", bases[dtype]), ("warm", warmed(bases[dtype]))):
        done: list[Done] = []
        for n in range(3):
            parent = parent_of(done[-1], n) if done else None
            assert (base.warm.find(tmp_path / place, parent) is not None) == (place == "warm" and n > 0)
            lease = make_lease(run_id=f"run_{n}", seed=n, parent=parent, training=make_training(**settings))
            done.append(run(base, tmp_path / place, lease))
        chains.append([version_digest(d.files) for d in done])
    assert chains[0] == chains[1]
    assert len(set(chains[0])) == 3, "each job moves the weights"
    has_average = any(f.name == "trainer/teacher.safetensors" for f in done[-1].files)
    assert has_average == ("preset" in settings)


def test_a_job_that_comes_to_nothing_leaves_its_parent_as_it_was(
    bases: dict[str, BaseModel], make_lease: Any, tmp_path: Path
) -> None:
    base = warmed(bases["float32"])
    first = run(base, tmp_path, make_lease(run_id="run_1"))
    second = make_lease(run_id="run_2", parent=parent_of(first))
    asked = iter([False, False, True])  # scored, one step taken
    with pytest.raises(StoppedError):
        run(base, tmp_path, second, lambda: next(asked))
    assert base.warm.find(tmp_path, second.parent) is not None
    again = run(base, tmp_path, second)
    cold = run(bases["float32"], tmp_path, make_lease(run_id="run_2b", parent=parent_of(first)))
    trained = [[f for f in done.files if f.name.endswith(".safetensors")] for done in (again, cold)]
    assert trained[0] == trained[1]


def _append(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b" ")


def _same_size(weights: Path) -> None:
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)


def _one_more(weights: Path) -> None:
    (weights.parent / "more.txt").write_text("more")


@pytest.mark.parametrize("touch", [Path.unlink, _append, _same_size, _one_more])
def test_files_that_were_touched_are_read_and_refused(
    bases: dict[str, BaseModel], make_lease: Any, tmp_path: Path, touch: Callable[[Path], None]
) -> None:
    base = warmed(bases["float32"])
    first = run(base, tmp_path, make_lease(run_id="run_1"))
    touch(tmp_path / first.uri / "adapter" / "adapter_model.safetensors")
    with pytest.raises(TrainingFailedError) as caught:
        run(base, tmp_path, make_lease(run_id="run_2", parent=parent_of(first)))
    assert caught.value.code == "parent_corrupt"


def test_another_parent_than_the_newest_comes_from_disk(
    bases: dict[str, BaseModel], make_lease: Any, tmp_path: Path
) -> None:
    """After a rollback the version that was kept is nobody's parent any more."""
    base = warmed(bases["float32"])
    first = run(base, tmp_path, make_lease(run_id="run_1"))
    second = run(base, tmp_path, make_lease(run_id="run_2", parent=parent_of(first)))
    assert base.warm.find(tmp_path, parent_of(second).model_copy(update={"digest": "sha256:0"})) is None
    assert base.warm.find(tmp_path, parent_of(second)) is None, "dropped"
    run(base, tmp_path, make_lease(run_id="run_3", parent=parent_of(first)))
    assert base.warm.find(tmp_path, parent_of(first)) is None


def test_the_longest_unused_goes_first(bases: dict[str, BaseModel], make_lease: Any, tmp_path: Path) -> None:
    one = warmed(bases["float32"])
    size = (run(one, tmp_path, make_lease("adp_size")), one.warm.nbytes)[1]
    base = warmed(bases["float32"], 2 * size)
    done = [run(base, tmp_path, make_lease(f"adp_{n}")) for n in range(2)]
    assert base.warm.find(tmp_path, parent_of(done[0])) is not None, "used: the other one is older now"
    done.append(run(base, tmp_path, make_lease("adp_2")))
    assert [base.warm.find(tmp_path, parent_of(d)) is not None for d in done] == [True, False, True]
    assert base.warm.nbytes == 2 * size
    small = warmed(bases["float32"], size - 1)
    assert small.warm.find(tmp_path, parent_of(run(small, tmp_path, make_lease("adp_large")))) is None
