"""The work over the vocabulary against autograd on the obvious formulas, in float64 and float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core.fast.rows import RowStats, row_grad_, row_stats


def case(n: int, v: int, k: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, distinct kept tokens, response tokens."""
    g = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(n, v, generator=g, dtype=torch.float64) * scale
    index_NK = torch.argsort(torch.rand(n, v, generator=g), dim=-1)[:, :k]
    return logits_NV, index_NK, torch.randint(0, v, (n,), generator=g)


def slow_stats(logits_NV: Tensor, index_NK: Tensor, ids_N: Tensor) -> RowStats:
    """The definitions, with gradient."""
    outside_NV = torch.ones_like(logits_NV, dtype=torch.bool).scatter(-1, index_NK, False)
    logp_NV = torch.log_softmax(logits_NV, -1)
    rest = [torch.logsumexp(row[on], -1) for row, on in zip(logits_NV, outside_NV, strict=True)]
    top_N = logits_NV.detach().amax(-1)
    return RowStats(
        top_N=top_N,
        lse_N=torch.logsumexp(logits_NV, -1) - top_N,
        rest_N=torch.stack(rest) - top_N if rest else logits_NV.new_zeros(0),
        picked_NK=logits_NV.gather(-1, index_NK) - top_N.unsqueeze(-1),
        chosen_N=logits_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1) - top_N,
        entropy_N=-(logp_NV.exp() * logp_NV).sum(-1),
    )


SHAPES = st.tuples(st.integers(0, 5), st.integers(2, 70), st.integers(0, 9), st.integers(0, 10_000))


@settings(deadline=None)
@given(shape=SHAPES)
def test_stats_are_their_definitions(shape: tuple[int, int, int, int]) -> None:
    n, v, k, seed = shape
    logits_NV, index_NK, ids_N = case(n, v, min(k, v - 1), seed)
    found, expected = row_stats(logits_NV, index_NK, ids_N), slow_stats(logits_NV, index_NK, ids_N)
    for name in ("top_N", "lse_N", "rest_N", "picked_NK", "chosen_N", "entropy_N"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(shape=SHAPES)
def test_gradient_is_autograds(shape: tuple[int, int, int, int]) -> None:
    """Any loss of the four differentiable statistics has a gradient of `row_grad_`'s form."""
    n, v, k, seed = shape
    logits_NV, index_NK, ids_N = case(n, v, min(k, v - 1), seed)
    g = torch.Generator().manual_seed(seed + 1)
    leaf_NV = logits_NV.clone().requires_grad_()
    s = slow_stats(leaf_NV, index_NK, ids_N)
    d_lse, d_rest, d_chosen = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    d_picked = torch.randn(index_NK.shape, generator=g, dtype=torch.float64)
    loss = (d_lse * s.lse_N).sum() + (d_rest * s.rest_N).sum() + (d_chosen * s.chosen_N).sum()
    loss = loss + (d_picked * s.picked_NK).sum()
    (expected_NV,) = torch.autograd.grad(loss, leaf_NV)
    p_NK = (s.picked_NK - s.lse_N.unsqueeze(-1)).exp().detach()
    found_NV = row_grad_(
        logits_NV, s.top_N + s.lse_N.detach(), (d_lse + d_rest * (s.lse_N - s.rest_N).exp()).detach(),
        index_NK, d_picked + d_lse.unsqueeze(-1) * p_NK, ids_N, d_chosen,
    )  # fmt: skip
    assert found_NV is logits_NV
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-9, atol=1e-9)


def test_tail_of_a_peaked_row_is_summed_not_subtracted() -> None:
    """A mass of e-20 outside the kept token: a float32 complement would be exactly 0."""
    logits_NV = torch.full((1, 50), -24.0)
    logits_NV[0, 3] = 0.0
    stats = row_stats(logits_NV, torch.tensor([[3]]), torch.tensor([3]))
    assert float(stats.rest_N - stats.lse_N) == pytest.approx(-24.0 + math.log(49), rel=1e-6)


def test_forbidden_tokens_and_huge_logits() -> None:
    logits_NV = torch.tensor([[0.0, -math.inf, 1e4, 1e4], [-1e4, -1e4, -math.inf, -math.inf]])
    stats = row_stats(logits_NV, torch.tensor([[2], [0]]), torch.tensor([1, 1]))
    assert stats.top_N.tolist() == [1e4, -1e4]
    assert stats.lse_N.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert stats.entropy_N.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert stats.chosen_N.tolist() == [-math.inf, 0.0]


def test_nothing_left_outside() -> None:
    stats = row_stats(torch.zeros(1, 2), torch.tensor([[1, 0]]), torch.tensor([0]))
    assert stats.rest_N.tolist() == [-math.inf]


def test_bfloat16_is_computed_in_float32() -> None:
    logits_NV, index_NK, ids_N = case(4, 500, 7)
    low_NV = logits_NV.bfloat16()
    found, expected = row_stats(low_NV, index_NK, ids_N), slow_stats(low_NV.double(), index_NK, ids_N)
    assert found.lse_N.dtype == torch.float32
    torch.testing.assert_close(found.lse_N.double(), expected.lse_N, rtol=1e-6, atol=1e-6)
    grad_NV = row_grad_(
        low_NV, found.top_N + found.lse_N, torch.full((4,), 2.0), index_NK, torch.zeros(4, 7), ids_N, torch.zeros(4)
    )  # fmt: skip
    assert grad_NV.dtype == torch.bfloat16
    softmax_NV = torch.softmax(logits_NV.bfloat16().double(), -1).scatter(-1, index_NK, 0.0)
    torch.testing.assert_close(grad_NV.double(), 2 * softmax_NV, rtol=1e-2, atol=1e-6)
