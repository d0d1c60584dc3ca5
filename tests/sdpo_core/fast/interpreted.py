"""The Triton kernels in triton's interpreter against the torch version in float64.

Run by test_rows_triton.py in a process of its own: triton reads TRITON_INTERPRET once, when it is first imported.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core.fast import rows, rows_triton

FIELDS = ("top_N", "lse_N", "rest_N", "picked_NK", "chosen_N", "entropy_N")
VOCABULARIES = st.one_of(st.integers(1, 140), st.sampled_from([4095, 4096, 4097, 9000]))
"""Around the block of 4096, and far below it."""
SIZES = st.tuples(st.integers(0, 4), VOCABULARIES, st.integers(0, 128), st.integers(0, 10_000))
Case = tuple[Tensor, Tensor, Tensor]


def case(sizes: tuple[int, int, int, int], scale: float = 4.0) -> Case:
    """Logits, some of them -inf and one of them high; distinct kept tokens; response tokens, kept and not."""
    n, v, k, seed = sizes
    g = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(n, v, generator=g) * scale
    logits_NV[torch.rand(n, v, generator=g) < 0.05] = -math.inf
    logits_NV.scatter_(-1, torch.randint(0, v, (n, 1), generator=g), 3 * scale)
    index_NK = torch.argsort(torch.rand(n, v, generator=g), dim=-1)[:, : min(k, v)]
    return logits_NV, index_NK, torch.randint(0, v, (n,), generator=g)


@settings(deadline=None)  # the first call imports triton
@given(sizes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_stats_are_the_torch_versions(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    logits_NV, index_NK, ids_N = case(sizes)
    logits_NV = logits_NV.to(dtype)
    before_NV = logits_NV.clone()
    found = rows_triton.row_stats(logits_NV, index_NK, ids_N)
    expected = rows.row_stats(before_NV.double(), index_NK, ids_N)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=2e-6, atol=2e-6)
    assert torch.equal(logits_NV, before_NV)


@settings(deadline=None)  # the first call imports triton
@given(sizes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_gradient_is_the_torch_versions(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    logits_NV, index_NK, ids_N = case(sizes)
    logits_NV = logits_NV.to(dtype)
    g = torch.Generator().manual_seed(sizes[-1] + 1)
    spread_N, at_chosen_N = torch.randn(2, len(ids_N), generator=g).unbind(0)
    at_index_NK = torch.randn(index_NK.shape, generator=g)
    lse_N = torch.logsumexp(logits_NV.float(), -1)
    expected_NV = rows.row_grad_(
        logits_NV.double(), lse_N.double(), spread_N.double(), index_NK, at_index_NK.double(), ids_N,
        at_chosen_N.double(),
    )  # fmt: skip
    found_NV = rows_triton.row_grad_(logits_NV, lse_N, spread_N, index_NK, at_index_NK, ids_N, at_chosen_N)
    assert found_NV is logits_NV
    rounding = 2e-6 if dtype == torch.float32 else 2**-7  # the interpreter cuts to bfloat16, a GPU rounds
    torch.testing.assert_close(found_NV.double(), expected_NV, rtol=rounding, atol=1e-6)


def test_a_response_token_among_the_kept_gets_both() -> None:
    logits_NV = torch.zeros(2, 6)
    row_of = torch.tensor([[4, 1], [4, 1]])
    found_NV = rows_triton.row_grad_(
        logits_NV, torch.full((2,), math.log(6)), torch.tensor([6.0, 6.0]), row_of, torch.tensor([[5.0, 7.0]] * 2),
        torch.tensor([1, 2]), torch.tensor([10.0, 10.0]),
    )  # fmt: skip
    torch.testing.assert_close(found_NV, torch.tensor([[1.0, 17, 1, 1, 5, 1], [1.0, 7, 11, 1, 5, 1]]))


def test_huge_logits_and_a_tail_beyond_float32() -> None:
    """Entropy of logits near 1e4 to 1e-6, where lse - sum p l keeps three digits, and a tail of e^-200."""
    logits_NV = torch.full((2, 300), -200.0)
    logits_NV[0, :2] = torch.tensor([1e4, 1e4 - 1])
    logits_NV[1, :2] = 0.0
    stats = rows_triton.row_stats(logits_NV, torch.tensor([[0, 1], [0, 1]]), torch.tensor([1, 299]))
    p = 1 / (1 + math.exp(-1.0))
    assert float(stats.entropy_N[0]) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert stats.rest_N.tolist() == pytest.approx([-200 - 1e4 + math.log(298), -200 + math.log(298)], rel=1e-6)
    assert stats.chosen_N.tolist() == [-1.0, -200.0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, on what is broken on purpose
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_shows_and_leaves_the_others(bad: float) -> None:
    logits_NV = torch.zeros(2, 50)
    logits_NV[0, 7] = bad
    for kept in ([[7, 8], [7, 8]], [[1, 2], [1, 2]]):
        stats = rows_triton.row_stats(logits_NV, torch.tensor(kept), torch.tensor([0, 0]))
        assert not bool(stats.lse_N[0].isfinite())
        assert not bool(stats.entropy_N[0].isfinite())
        assert float(stats.lse_N[1]) == pytest.approx(math.log(50))


def test_rows_may_lie_apart_but_not_their_logits() -> None:
    wide_NV = torch.randn(3, 90, generator=torch.Generator().manual_seed(0))
    part_NV, index_NK, ids_N = wide_NV[:, :70], torch.tensor([[1], [2], [3]]), torch.tensor([69, 0, 1])
    found = rows_triton.row_stats(part_NV, index_NK, ids_N)
    torch.testing.assert_close(found.top_N + found.lse_N, torch.logsumexp(part_NV, -1))
    with pytest.raises(ValueError, match="side by side"):
        rows_triton.row_stats(wide_NV.T, index_NK, ids_N)
    with pytest.raises(TypeError, match="float16"):
        rows_triton.row_stats(part_NV.half(), index_NK, ids_N)


def test_a_cpu_is_not_for_these_kernels() -> None:
    assert not rows_triton.usable(torch.zeros(1, 2))
    assert rows_triton.rows_for(torch.zeros(1, 2)) == (rows.row_stats, rows.row_grad_)
