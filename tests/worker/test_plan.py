"""The plan of a job: from free memory to how much is computed at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_core.fast.scores import chunk_tokens
from sdpo_core.options import Options
from worker.memory import LOGIT_COPIES, ModelShape, chunk_bytes, kv_bytes
from worker.plan import candidates, fitting, free_bytes, needed

GIB = 2**30
EIGHT_B = ModelShape(
    hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, vocabulary=151936, window=40960,
    parameters=8_190_735_360, layer_matrices=6_945_767_424,
)  # fmt: skip
LENGTHS = [1024] * 8


def plan(free: int, lengths: list[int] = LENGTHS) -> Options:
    return fitting(Options(), EIGHT_B, lengths, rank=32, free=free, device="cuda", width=2)


def bytes_of(options: Options, lengths: list[int] = LENGTHS) -> int:
    tokens = max(min(options.micro_batch_tokens, sum(lengths)), *lengths)
    return needed(EIGHT_B, tokens, 32, "cuda", 2, checkpointing=options.checkpointing)


def test_plenty_of_memory_changes_nothing() -> None:
    assert plan(500 * GIB) == Options()


def test_less_memory_means_smaller_micro_batches_first_and_then_checkpointing() -> None:
    plans = [plan(gib * GIB) for gib in (100, 60, 30, 20, 8)]
    sizes = [(p.checkpointing, p.micro_batch_tokens) for p in plans]
    assert [c for c, _ in sizes] == sorted(c for c, _ in sizes)
    unchecked = [tokens for c, tokens in sizes if not c]
    assert unchecked == sorted(unchecked, reverse=True)
    assert len(set(unchecked)) > 1
    assert plans[-1].checkpointing


@given(gib=st.integers(6, 200), lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=12))
def test_what_is_planned_fits_or_is_the_least_there_is(gib: int, lengths: list[int]) -> None:
    chosen = plan(gib * GIB, lengths)
    assert bytes_of(chosen, lengths) <= gib * GIB or chosen == list(candidates(Options(), lengths))[-1]


def test_no_memory_at_all_is_still_a_plan() -> None:
    chosen = plan(0)
    assert chosen.checkpointing
    assert chosen.micro_batch_tokens >= 1


def test_the_plain_path_is_planned_with_the_logits_of_whole_micro_batches() -> None:
    """Half of each sample is response: 33 bytes x 151,936 each. Checkpointing is the fast path's alone."""

    def plain(gib: int) -> Options:
        return fitting(Options(), EIGHT_B, LENGTHS, rank=32, free=gib * GIB, device="cuda", width=2, plain_share=0.5)

    assert plain(500) == Options()
    fast = plan(55 * GIB)
    assert plain(55).micro_batch_tokens < fast.micro_batch_tokens
    assert not plain(1).checkpointing
    sizes = [
        needed(EIGHT_B, 2048, 32, "cuda", 2, checkpointing=False, plain_responses=responses) for responses in (0, 1024)
    ]
    assert sizes[1] - sizes[0] == 1024 * 151_936 * 33


def test_a_chunk_is_the_fast_paths() -> None:
    for vocabulary in (2_176, 151_936, 1_000_000):
        shape = replace(EIGHT_B, vocabulary=vocabulary)
        logits = chunk_tokens(vocabulary) * vocabulary
        assert 0 <= chunk_bytes(shape) - logits * 4 * LOGIT_COPIES < vocabulary * 4 * LOGIT_COPIES


def test_what_the_teacher_writes_is_in_the_plan() -> None:
    """Keys and values of as many tokens: one pair for each query and many layers are more than checkpointing keeps."""
    deep = replace(EIGHT_B, kv_heads=32, layers=80)
    assert needed(deep, 4096, 32, "cuda", 2, checkpointing=True) > 4096 * kv_bytes(deep, 2)


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 0
