"""The seal of a base: a change of any one weight is noticed, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3ForCausalLM

from sdpo_core import LoraSpec, Options, Sample, attached, make_optimizer, train_batch
from sdpo_core.seal import _sums, seal_of

OPTIONS = Options(top_k=7, steps=1, stop_gap=0.0, learning_rate=5e-3)
SAMPLES = [Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_any_weight_is_noticed(base: Qwen3ForCausalLM, dtype: torch.dtype) -> None:
    """Flipped behind the back of version counters, in each weight's last place: the embedding of a token that nobody
    asks for as well. Flipped back, all is well."""
    base = base.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    weights = [weight for _, weight in base.named_parameters()]
    with attached(base, LoraSpec()) as policy:
        assert policy.base_intact()
        for weight in weights:
            place = weight.data.view(bits).view(-1)[-1:]
            place ^= 1
            assert not policy.base_intact()
            place ^= 1
        assert policy.base_intact()


def test_weights_that_change_places_are_noticed(base: Qwen3ForCausalLM) -> None:
    """Of a row that the fixed tokens do not read, so that the sums alone can tell."""
    before = seal_of(base)
    for rows in ([41, 40], [40]):
        table = base.model.embed_tokens.weight.data
        kept = table.clone()
        table[40 : 40 + len(rows)] = table[rows] if len(rows) == 2 else table[40].flip(0)
        after = seal_of(base)
        assert torch.equal(after.answers, before.answers)
        assert not before.same(after)
        table.copy_(kept)
    assert before.same(seal_of(base))


def test_words_of_one_column_or_one_row_that_change_places_are_noticed() -> None:
    """Columns and rows are those of the sums: 1024 words of 8 bytes."""
    weight = torch.arange(3 * 2048 + 5, dtype=torch.float32)
    before = _sums(weight)
    for a, b in ((0, 2048), (0, 2), (4096, 6144)):
        moved = weight.clone()
        moved[a : a + 2], moved[b : b + 2] = weight[b : b + 2], weight[a : a + 2]
        assert not torch.equal(_sums(moved), before)


def test_training_and_another_job_leave_it_whole(base: Qwen3ForCausalLM) -> None:
    before = seal_of(base)
    for rank in (2, 4):
        with attached(base, LoraSpec(rank=rank)) as policy:
            assert train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS).warnings == ()
    assert before.same(seal_of(base))


def test_a_changed_weight_that_no_answer_shows_is_a_warning(base: Qwen3ForCausalLM) -> None:
    table = base.model.embed_tokens.weight.data
    with attached(base, LoraSpec()) as policy:
        kept = table[60].clone()
        table[60] += 1.0
        result = train_batch(policy, make_optimizer(policy, OPTIONS), SAMPLES, OPTIONS)
        table[60] = kept
        assert [w.code for w in result.warnings] == ["base_changed"]
