"""Two processes that share a batch (gloo) against one that has it alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_core.ranks import LONE, shares, total
from sdpo_core.report import Sums
from tests.sdpo_core import rank_program as program

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks came to."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        shared = os.environ | {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.sdpo_core.rank_program", str(listener.fileno()), str(out)],
                env=shared | {"RANK": str(rank)},
                pass_fds=(listener.fileno(),),
                cwd=REPOSITORY,
            )
            for rank in (0, 1)
        ]
    assert [process.wait(300) for process in running] == [0, 0]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@cache
def by_itself(name: str) -> dict[str, Any]:
    return program.train(name, LONE)


@pytest.mark.parametrize("name", list(program.CASES))
def test_two_ranks_train_what_one_trains(found: list[dict[str, Any]], name: str) -> None:
    alone = by_itself(name)
    for rank in found:
        here = rank[name]
        assert here["path"] == alone["path"] == program.CASES[name].path
        assert here["outcomes"] == alone["outcomes"]
        assert here["answers"] == alone["answers"]
        for mine, one in zip(here["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(mine, one, rtol=2e-5, atol=2e-6)
        for mine, one in zip(here["metrics"], alone["metrics"], strict=True):
            assert mine == pytest.approx(one, rel=1e-4, abs=1e-6)
    for a, b in zip(found[0][name]["weights"], found[1][name]["weights"], strict=True):
        assert torch.equal(a, b), "the ranks' adapters drift apart"


@pytest.mark.parametrize("name", list(program.CASES))
def test_the_cases_show_what_they_are_for(name: str) -> None:
    """Clipping is active in ratio and gradient, and the steps move the weights far more than the tolerance."""
    alone = by_itself(name)
    assert all(m["grad_norm"] > program.CASES[name].options().max_grad_norm for m in alone["metrics"])
    if "clipped" in name:
        assert alone["metrics"][-1]["clip_fraction"] > 0
    if program.CASES[name].rollouts == "both":
        assert len(alone["answers"]) > len(program.CASES[name].rows), "the teacher has written some"
    moved = max(float((a - b).abs().max()) for a, b in zip(alone["weights"], program.untrained(), strict=True))
    assert moved > 1e-3


def test_a_share_alone_is_another_training(found: list[dict[str, Any]]) -> None:
    """The tolerance tells a whole batch from one rank's half of it."""
    whole, half = found[0]["plain, clipped"]["weights"], program.train("plain, clipped", LONE, rows=[0, 2])["weights"]
    assert max(float((a - b).abs().max()) for a, b in zip(whole, half, strict=True)) > 1e-4


def test_a_stop_on_one_rank_stops_both(found: list[dict[str, Any]]) -> None:
    assert [rank["stopped"] for rank in found] == [("cancelled", 1), ("cancelled", 1)]


def test_each_rank_runs_its_share_only(found: list[dict[str, Any]]) -> None:
    rows = [rank["plain, clipped"]["rows"] for rank in found]
    assert sorted(rows[0] + rows[1]) == list(range(len(program.batch())))
    assert min(map(len, rows)) > 0


def test_a_sharded_base_answers_like_the_whole_one(found: list[dict[str, Any]]) -> None:
    for rank in found:
        case = rank["sharded"]
        assert case["held"] == pytest.approx(case["whole"] / 2, rel=0.02), "bytes of the base on each rank"
        assert case["reason"] == "the base is sharded over ranks"
        for name in ("bare", "adapted"):
            assert torch.equal(case[name], case[f"{name}, whole"])
        for a, b in zip(case["gradients"], case["gradients, whole"], strict=True):
            assert torch.equal(a, b)
        assert case["intact"], "the base comes back as it was"


def test_ranks_with_a_sharded_base_train_what_one_trains(found: list[dict[str, Any]]) -> None:
    """With shares of one and of two micro-batches, so that one rank runs one for nothing."""
    alone = by_itself("plain, clipped")
    assert sorted(rank["sharded"]["trained"]["micro_batches"] for rank in found) == [1, 2]
    for rank in found:
        trained = rank["sharded"]["trained"]
        assert rank["sharded"]["written"] == by_itself("both write")["answers"]
        assert trained["answers"] == alone["answers"]
        for mine, one in zip(trained["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(mine, one, rtol=2e-5, atol=2e-6)


def test_shares_balance_tokens_and_cover_every_row() -> None:
    assert shares([10, 1, 1, 8, 2], 2) == [[0, 1], [2, 3, 4]]
    assert shares([5], 3) == [[0], [], []]
    assert shares([], 2) == [[], []]


def test_a_lone_ranks_sums_stay_as_they_are() -> None:
    parts = [Sums(distill=0.1, max_ratio=3.0), Sums(distill=0.2, max_ratio=2.0)]
    assert total(parts[:1]) == parts[0]
    assert (total(parts).distill, total(parts).max_ratio) == (pytest.approx(0.3), 3.0)
