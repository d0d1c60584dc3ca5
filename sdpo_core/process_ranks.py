"""Ranks that are processes, through torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdpo_core.ranks import RankLost

T = TypeVar("T")
FOREVER = timedelta(days=7)
"""Nobody gives up waiting for a slow rank: whoever started the ranks ends those that stand still."""


class ProcessRanks:
    """Implements `ranks.Ranks` over the default process group. Raises RankLost once another rank is gone."""

    def __init__(self, *, lockstep: bool = False) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.lockstep = lockstep

    def gathered(self, value: T) -> list[T]:
        found: list[T] = [value] * self.size
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return found

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """One sum in float32 over everything. In front of the numbers stands which gradients there are."""
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([there, *(part.float().flatten() for part in parts)])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        present, *sums = torch.split(flat, [len(parameters), *(p.numel() for p in parameters)])
        for parameter, summed, count in zip(parameters, sums, present.tolist(), strict=True):
            parameter.grad = _like(summed, parameter) if count else None


def _like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    return flat.view_as(parameter).to(parameter.dtype)


def join(store_descriptor: int | None = None, *, lockstep: bool = False) -> ProcessRanks:
    """Enter the group that torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) names, and wait until
    all are there. `store_descriptor`: a listening socket on that port, for rank 0, so that no port is guessed."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun hosts the store itself
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, hosts,
        timeout=FOREVER, master_listen_fd=store_descriptor if hosts else None,
    )  # fmt: skip
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER)
    return ProcessRanks(lockstep=lockstep)


def leave() -> None:
    """Close the group's connections."""
    dist.destroy_process_group()
