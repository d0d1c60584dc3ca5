"""From logits to tokens: greedy, temperature, min-p, top-k, top-p; and the log-probabilities that are reported.

Reported log-probabilities are vLLM's default `raw_logprobs`: log-softmax in fp32 of the logits as the model gave them,
before temperature and filters. Each request draws from its own generator, so that its tokens do not depend on its
neighbours in the batch.

Shapes: B rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# vLLM's limits: below the first a request is greedy; between the two the temperature is raised to the second.
_GREEDY_BELOW = 1e-5
_LOWEST_TEMPERATURE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request draws its tokens. top_k 0 or -1 keeps all tokens; seed None draws a fresh one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True)
class Draw:
    """What one row drew: the token, its raw log-probability, and the K most likely (token, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def new_generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """The random stream of one request; None for greedy requests."""
    if sampling.greedy:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def draw(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator | None],
    top_counts: Sequence[int],
    forced: Sequence[int | None] = (),
) -> list[Draw | None]:
    """One token per row; None for a row whose logits hold a NaN or +inf, or nothing but -inf.

    `top_counts[b]` is the number of most likely tokens wanted for row b; `forced[b]`, where given, is taken instead of
    what would be drawn.
    """
    logits_BV = logits_BV.float()
    logprobs_BV = logits_BV.log_softmax(-1)
    tokens_B = _tokens(logits_BV, samplings, generators)
    for row, token in enumerate(forced):
        if token is not None:
            tokens_B[row] = token
    chosen = logprobs_BV.gather(-1, tokens_B[:, None])[:, 0].tolist()
    broken = logprobs_BV.amax(-1).isnan().tolist()
    tops = _top(logprobs_BV, top_counts)
    return [None if broken[row] else Draw(token, chosen[row], tops[row]) for row, token in enumerate(tokens_B.tolist())]


def _tokens(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> Tensor:
    tokens_B = logits_BV.argmax(-1)
    rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not rows:
        return tokens_B
    rows_N = torch.tensor(rows, device=logits_BV.device)
    weights_NV = filtered(logits_BV[rows_N], [samplings[row] for row in rows]).softmax(-1)
    # argmax(p / e) with e ~ Exp(1) is a draw from p: the race of exponential clocks. Each row has its own clocks.
    clocks_NV = torch.empty_like(weights_NV)
    for index, row in enumerate(rows):
        clocks_NV[index].exponential_(generator=generators[row])
    tokens_B[rows_N] = (weights_NV / clocks_NV).argmax(-1)
    return tokens_B


def filtered(logits_NV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Logits after temperature, min-p, top-k and top-p, in vLLM's order; dropped tokens are -inf.

    A row's result does not depend on the other rows: a filter that a row does not ask for leaves it as it is.
    """
    temperatures = [max(sampling.temperature, _LOWEST_TEMPERATURE) for sampling in samplings]
    logits_NV = logits_NV / _column(temperatures, logits_NV)
    if any(sampling.min_p > 0 for sampling in samplings):
        probs_NV = logits_NV.softmax(-1)
        floor_N1 = probs_NV.amax(-1, keepdim=True) * _column([s.min_p for s in samplings], logits_NV)
        logits_NV = logits_NV.masked_fill(probs_NV < floor_N1, -torch.inf)
    if any(sampling.top_k > 0 or sampling.top_p < 1 for sampling in samplings):
        logits_NV = _top_k_top_p(logits_NV, samplings)
    return logits_NV


def _top_k_top_p(logits_NV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    size = logits_NV.shape[-1]
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    kept = [sampling.top_k if sampling.top_k > 0 else size for sampling in samplings]
    drop_NV = torch.arange(size, device=logits_NV.device)[None] >= _column(kept, logits_NV)
    sorted_NV = sorted_NV.masked_fill(drop_NV, -torch.inf)
    # A token stays while the mass before it is below top_p; the first always stays. top_p 1 drops nothing, whatever
    # the rounding of the sum.
    probs_NV = sorted_NV.softmax(-1)
    before_NV = probs_NV.cumsum(-1) - probs_NV
    limits = [sampling.top_p if sampling.top_p < 1 else torch.inf for sampling in samplings]
    drop_NV = before_NV >= _column(limits, logits_NV)
    drop_NV[:, 0] = False
    sorted_NV = sorted_NV.masked_fill(drop_NV, -torch.inf)
    return torch.empty_like(logits_NV).scatter_(-1, order_NV, sorted_NV)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _top(logprobs_BV: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    most = min(max(counts), logprobs_BV.shape[-1])
    if most == 0:
        return [()] * len(counts)
    values_BK, tokens_BK = logprobs_BV.topk(most, dim=-1)
    rows = zip(tokens_BK.tolist(), values_BK.tolist(), counts, strict=True)
    return [tuple(zip(tokens[:count], values[:count], strict=True)) for tokens, values, count in rows]
