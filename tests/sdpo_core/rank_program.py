"""What one rank does in test_ranks: `python -m tests.sdpo_core.rank_program STORE_DESCRIPTOR DIRECTORY`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_core import LoraPolicy, Options, Sample, learnt_from, make_optimizer, train_batch
from sdpo_core.fast.path import obstacle
from sdpo_core.process_ranks import join, leave
from sdpo_core.ranks import Ranks
from sdpo_core.samples import token_batch
from sdpo_core.sharded import held_bytes, shard_base
from sdpo_core.sharing import SharedScorer
from tests.sdpo_core.conftest import adapter, tiny_model

NUMBERS = (
    "loss", "distill_loss", "anchor_loss", "gap", "base_kl", "peak_gap", "mean_ratio", "max_ratio", "clip_fraction",
    "entropy", "grad_norm", "response_tokens",
)  # fmt: skip
USUAL = {
    "top_k": 9, "steps": 4, "stop_gap": 0.0, "stop_gap_ratio": 0.0, "learning_rate": 1e-3, "is_clip": 1.5,
    "refresh": False, "max_grad_norm": 0.05, "micro_batch_tokens": 48, "base_kl_weight": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    path: str
    rows: tuple[int, ...] = (0, 1, 2, 3, 4)
    rollouts: str = "own"
    more: tuple[tuple[str, Any], ...] = ()

    def options(self) -> Options:
        return Options(**USUAL | {"path": self.path} | dict(self.more))


CORRECTED = (("rollout_correction", "token"), ("rollout_normalise", True), ("top_entropy", 0.6))
CASES = {
    "plain, clipped": Case("plain"),
    "fast, clipped": Case("fast"),
    "one answer": Case("fast", rows=(0,)),
    "three answers": Case("fast", rows=(0, 1, 2)),
    "whole-batch weights": Case("fast", more=CORRECTED),
    "refreshed live teacher": Case("fast", more=(("teacher", "live"), ("refresh", True))),
    "both write": Case("fast", rows=(0, 1, 2), rollouts="both"),
}


def batch() -> list[Sample]:
    """Ragged in every direction; the last has no behaviour log-probs."""
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 64, (n,), generator=g).tolist())

    samples = []
    for prompt, response, teacher in ((4, 16, 9), (13, 5, 20), (3, 1, 7), (6, 11, 6), (1, 8, 30)):
        logps = tuple((-2.0 - 4.0 * torch.rand(response, generator=g)).tolist())
        samples.append(Sample(ids(prompt), ids(response), ids(teacher), logps))
    return [*samples[:-1], replace(samples[-1], behaviour_logprobs=None)]


def model() -> Any:
    base = tiny_model()
    base.generation_config.eos_token_id = list(range(0, 64, 3))  # a random model hits one of many soon
    return base


def weights(policy: LoraPolicy) -> list[Tensor]:
    return [p.detach().clone() for _, p in policy.trainable()]


def untrained() -> list[Tensor]:
    return weights(adapter(model()))


def train(name: str, ranks: Ranks, rows: Sequence[int] | None = None, base: nn.Module | None = None) -> dict[str, Any]:
    """A case's batch, or `rows` of it."""
    case = CASES[name]
    policy = adapter(model() if base is None else base)
    samples = [batch()[r] for r in rows or case.rows]
    learnt = learnt_from(policy, samples, case.rollouts, max_new_tokens=12, ranks=ranks)  # type: ignore[arg-type]
    options = case.options()
    result = train_batch(policy, make_optimizer(policy, options), learnt, options, ranks=ranks)
    scorer = SharedScorer(None, ranks, learnt)  # type: ignore[arg-type]
    found = {
        "weights": weights(policy),
        "metrics": [{n: asdict(m)[n] for n in NUMBERS} for m in result.steps],
        "outcomes": [m.outcome for m in result.steps],
        "path": result.steps[0].path,
        "micro_batches": result.steps[0].plan.micro_batches,  # type: ignore[union-attr]
        "rows": scorer.rows,
        "answers": [s.response_ids for s in learnt],
    }
    policy.detach()
    return found


def stopped(ranks: Ranks) -> tuple[str, int]:
    """Rank 1 alone is told to stop, after the first step."""
    policy, options = adapter(model()), CASES["plain, clipped"].options()
    asked = iter([False, ranks.rank == 1, False, False])
    result = train_batch(
        policy, make_optimizer(policy, options), batch(), options, ranks=ranks, should_stop=lambda: next(asked)
    )
    return result.stop_reason, len(result.steps)


def once(base: nn.Module, seed: int) -> dict[str, Any]:
    """Logits with the adapter off and on, and a gradient, of tokens of one's own."""
    policy = adapter(base)
    ids = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = token_batch([ids[:4]], [ids[4:]], policy.device)
    bare, adapted = policy.logits(tokens, adapter=False), policy.logits(tokens, adapter=True)
    torch.autograd.backward(adapted.log_softmax(-1)[..., 5].sum())
    gradients = [p.grad for _, p in policy.trainable()]
    found = {"bare": bare, "adapted": adapted.detach(), "gradients": gradients, "reason": obstacle(policy)}
    intact = policy.base_intact()
    return found | {"intact": policy.base_unchanged(policy.detach()) and intact}


def sharded(ranks: Ranks, lockstep: Ranks) -> dict[str, Any]:
    whole, base = model(), model()
    shard_base(base, torch.device("cpu"), ranks.size)
    expected = {f"{name}, whole": value for name, value in once(whole, ranks.rank).items()}
    size = {"whole": held_bytes(whole), "held": held_bytes(base)}
    return (
        expected
        | once(base, ranks.rank)
        | size
        | {
            "trained": train("plain, clipped", lockstep, base=base),
            "written": train("both write", lockstep, base=base)["answers"],
        }
    )


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(int(sys.argv[1]))
    found = {name: train(name, ranks) for name in CASES}
    found["stopped"] = stopped(ranks)  # type: ignore[assignment]
    lockstep = type(ranks)(lockstep=True)
    found["sharded"] = sharded(ranks, lockstep)
    torch.save(found, Path(sys.argv[2]) / f"{ranks.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
