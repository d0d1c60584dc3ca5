"""Parts of a step: the loss from hidden states alone, and how cost grows with tokens, adapters and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.step.baseline import Frozen, sample_loss
from benchmarks.step.measure import cpu_seconds, in_turn
from benchmarks.step.shapes import OPTIONS, RANK, Case, S, build
from benchmarks.step.variants import FAST
from sdpo_core import LoraSpec, attached
from sdpo_core.divergence import Target
from sdpo_core.fast.head import LossSpec, RowInputs, kept_gradient, loss_and_gradient
from sdpo_core.fast.scores import Head

HIDDEN = 512
VOCABULARY = 151_936
KEPT = 100
Tasks = dict[str, Callable[[], Tensor]]


def loss_tasks(tokens: int, vocabulary: int = VOCABULARY) -> Tasks:
    """Gradient into hidden states (N, H): the baseline's formulas over all tokens at once, and the fast path's."""
    draw = torch.Generator().manual_seed(tokens)
    hidden_NH = torch.randn(tokens, HIDDEN, generator=draw)
    head = Head(torch.randn(vocabulary, HIDDEN, generator=draw) / HIDDEN**0.5)
    ids_N = torch.randint(vocabulary, (tokens,), generator=draw)
    first_N1 = torch.randint(vocabulary, (tokens, 1), generator=draw)
    index_NK = (first_N1 + torch.arange(KEPT) * (vocabulary // KEPT)) % vocabulary  # distinct within a row
    teacher_NK = torch.log_softmax(torch.randn(tokens, KEPT, generator=draw), dim=-1)
    behaviour_N = torch.full((tokens,), -torch.log(torch.tensor(float(vocabulary))).item())
    frozen = Frozen(teacher_NK, index_NK, behaviour_N)
    inputs = RowInputs(torch.full((tokens,), 1.0 / tokens), behaviour_N)
    spec = LossSpec(OPTIONS.divergence, OPTIONS.is_clip)

    def baseline() -> Tensor:
        leaf_NH = hidden_NH.clone().requires_grad_()
        logp_NV = torch.log_softmax(nn.functional.linear(leaf_NH, head.weight_VH), dim=-1)
        own_N = logp_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)
        loss = sample_loss(logp_NV, own_N, frozen, behaviour_N, OPTIONS) / tokens
        (gradient_NH,) = torch.autograd.grad(loss, leaf_NH)
        return gradient_NH

    def fast() -> Tensor:
        target = Target(teacher_NK, index_NK)
        return loss_and_gradient(head, hidden_NH, ids_N, target, inputs, spec, 0)[1]

    def backward() -> Tensor:
        return kept_gradient(head, index_NK, teacher_NK)

    return {"baseline": baseline, "fast": fast, "backward": backward}


def token_scaling(sizes: tuple[int, ...] = (4, 8, 16), repetitions: int = 3) -> dict[int, float]:
    """Response tokens -> CPU seconds of one fast step on shape S with so many rows."""
    cases = {rows * S.response: build(S.scaled(rows=rows)) for rows in sizes}
    return _least({n: partial(_train, case) for n, case in cases.items()}, repetitions)


def adapter_scaling(sizes: tuple[int, ...] = (1, 2, 4), repetitions: int = 3) -> dict[int, float]:
    """Adapters -> CPU seconds of one fast step for each of them, one job after the other on one resident base."""
    case = build(S.scaled(rows=4))
    base = case.policy.model.unload()

    def jobs(count: int) -> None:
        for seed in range(count):
            with attached(base, LoraSpec(rank=RANK, seed=seed)) as policy:
                _train(Case(case.shape, policy, case.samples, ()))

    return _least({n: partial(jobs, n) for n in sizes}, repetitions)


def vocabulary_scaling(
    sizes: tuple[int, ...] = (32_000, 64_000, 128_000), repetitions: int = 5
) -> dict[str, dict[int, float]]:
    """Vocabulary -> CPU seconds for 256 tokens: loss and gradient, and the sparse backward through the head alone."""
    tasks = {size: loss_tasks(256, size) for size in sizes}
    return {
        name: _least({size: task[name] for size, task in tasks.items()}, repetitions) for name in ("fast", "backward")
    }


def _train(case: Case) -> None:
    case.train(FAST.replace(steps=1))


def _least(tasks: dict[int, Callable[[], object]], repetitions: int) -> dict[int, float]:
    """Least CPU seconds of each, taking turns: noise only adds."""
    seconds: dict[str, list[float]] = {str(size): [cpu_seconds(run)] for size, run in tasks.items()}
    for name, spent in in_turn({str(size): run for size, run in tasks.items()}, repetitions):
        seconds[name].append(spent)
    return {size: min(seconds[str(size)]) for size in tasks}
