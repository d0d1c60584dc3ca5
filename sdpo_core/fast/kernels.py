"""The two Triton kernels behind sdpo_core.fast.rows_triton. Importing this module needs triton.

One program per row (one response token). Shape legend: N rows, V vocabulary, K kept tokens. All arithmetic is float32
whatever the logits are stored as.

The kept tokens are taken out of the row before the pass over it (their logits are read, the floor is stored in their
place, and they are put back at the end), so that the pass itself sums the mass OUTSIDE them: the tail is exact where
the complement 1 - sum(kept) would cancel. The totals are the tail's sums and the K kept values.

A lane's running sums under a running maximum m: s0 = sum e^(l - m), s1 = sum (l - m) e^(l - m). Of the two factors
that an online logsumexp multiplies by, e^(m - max) and e^(l - max), one is always 1: one exponential per element.
The entropy is log s0 - s1 / s0; taken as lse - sum p l it would cancel for large logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
"""Stands for -inf: differences and products with it stay finite, and its exponential is 0 under any real maximum."""


@triton.jit
def raised(x):
    """-inf to the floor; NaN stays, so that a broken row shows."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def row_stats_kernel(
    logits_ptr, index_ptr, ids_ptr, top_ptr, lse_ptr, picked_ptr, chosen_ptr, entropy_ptr, rest_ptr,
    stride, vocabulary, kept, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(N, V) logits -> per row: the largest, the entropy, and counted from the largest: logsumexp, kept logits,
    chosen logit, logsumexp outside the kept."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    k = tl.arange(0, BLOCK_K)
    on_k = k < kept
    index = tl.load(index_ptr + row * kept + k, mask=on_k, other=0)
    stored = tl.load(logits + index, mask=on_k, other=0.0)
    chosen = tl.load(logits + tl.load(ids_ptr + row))
    tl.debug_barrier()
    tl.store(logits + index, tl.full((BLOCK_K,), FLOOR, stored.dtype), mask=on_k)
    tl.debug_barrier()

    v = tl.arange(0, BLOCK_V)
    m = tl.full((BLOCK_V,), FLOOR, tl.float32)
    s0 = tl.zeros((BLOCK_V,), tl.float32)
    s1 = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        x = raised(tl.load(logits + start + v, mask=start + v < vocabulary, other=FLOOR).to(tl.float32))
        higher = x > m
        d = tl.abs(x - m)
        t = tl.exp(-d)
        s1 = tl.where(higher, (s1 - s0 * d) * t, s1 - d * t)
        s0 = tl.where(higher, s0 * t + 1.0, s0 + t)
        m = tl.where(higher, x, m)
    tl.debug_barrier()
    tl.store(logits + index, stored, mask=on_k)

    picked = stored.to(tl.float32)
    x_k = tl.where(on_k, raised(picked), FLOOR)
    top = tl.maximum(tl.max(m, 0), tl.max(x_k, 0))
    outside, moment = scaled_sums(m, s0, s1, top)
    e_k = tl.where(on_k, tl.exp(x_k - top), 0.0)
    total = outside + tl.sum(e_k, 0)
    moment += tl.sum(e_k * (x_k - top), 0)
    tl.store(top_ptr + row, top)
    tl.store(lse_ptr + row, tl.log(total))
    tl.store(picked_ptr + row * kept + k, picked - top, mask=on_k)
    tl.store(chosen_ptr + row, chosen.to(tl.float32) - top)
    entropy = tl.log(total) - moment / total
    tl.store(entropy_ptr + row, tl.where(entropy < 0.0, 0.0, entropy))
    # Under its own maximum: under `top` the tail of a peaked row would underflow.
    own = tl.max(m, 0)
    rest, _ = scaled_sums(m, s0, s1, own)
    # Half the floor: in bfloat16 the floor itself is a little above itself.
    tl.store(rest_ptr + row, tl.where(own > 0.5 * FLOOR, own - top + tl.log(rest), float("-inf")))


@triton.jit
def scaled_sums(m, s0, s1, top):
    """The lanes' sums under one maximum."""
    scale = tl.exp(m - top)
    return tl.sum(s0 * scale, 0), tl.sum((s1 + s0 * (m - top)) * scale, 0)


@triton.jit
def row_grad_kernel(
    logits_ptr, lse_ptr, spread_ptr, index_ptr, at_index_ptr, ids_ptr, at_chosen_ptr,
    stride, vocabulary, kept, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits become spread * softmax, but at_index at the kept tokens, and at_chosen more at the chosen one."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    lse = tl.load(lse_ptr + row)
    spread = tl.load(spread_ptr + row)
    token = tl.load(ids_ptr + row)
    k = tl.arange(0, BLOCK_K)
    on_k = k < kept
    index = tl.load(index_ptr + row * kept + k, mask=on_k, other=-1)
    at_index = tl.load(at_index_ptr + row * kept + k, mask=on_k, other=0.0)
    is_token = index == token
    is_kept = tl.sum(is_token.to(tl.int32), 0) > 0
    here = spread * tl.exp(tl.load(logits + token).to(tl.float32) - lse)
    here = tl.where(is_kept, tl.sum(tl.where(is_token, at_index, 0.0), 0), here)
    tl.debug_barrier()

    v = tl.arange(0, BLOCK_V)
    for start in range(0, vocabulary, BLOCK_V):
        on_v = start + v < vocabulary
        x = tl.load(logits + start + v, mask=on_v, other=FLOOR).to(tl.float32)
        grad = spread * tl.exp(x - lse)
        tl.store(logits + start + v, grad.to(logits_ptr.dtype.element_ty), mask=on_v)
    tl.debug_barrier()
    tl.store(logits + index, at_index.to(logits_ptr.dtype.element_ty), mask=on_k)
    tl.debug_barrier()
    tl.store(logits + token, (here + tl.load(at_chosen_ptr + row)).to(logits_ptr.dtype.element_ty))
