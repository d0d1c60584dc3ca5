"""The base scored ahead of the batch, without an adapter: the same training, and refused where it does not belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from sdpo_core import (
    BarePolicy,
    LoraSpec,
    Options,
    Sample,
    TargetError,
    anchor_scores,
    attached,
    make_optimizer,
    teacher_targets,
    train_batch,
)
from tests.sdpo_core.conftest import tiny_model

SAMPLES = [
    Sample((1, 2, 3), (4, 5, 6), (1, 9, 2)),
    Sample((7,), (8,), (7, 3), taught=False),
    Sample((5, 5), (9, 1), (3,)),
]
OTHERS = [SAMPLES[0], SAMPLES[1], Sample((5, 6), (9, 1), (3,))]


def trained(base: Qwen3ForCausalLM, options: Options, **ahead: Any) -> tuple[list[Any], list[torch.Tensor]]:
    with attached(base, LoraSpec(rank=2, seed=1)) as policy:
        steps = train_batch(policy, make_optimizer(policy, options), SAMPLES, options, **ahead).steps
        return [(s.loss, s.base_kl, s.anchor_loss) for s in steps], [p.detach().clone() for _, p in policy.trainable()]


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("teacher", ["base", "previous"])
def test_what_was_scored_ahead_trains_the_same(base: Qwen3ForCausalLM, path: Any, teacher: Any) -> None:
    options = Options(
        top_k=5, steps=2, stop_gap=0.0, base_kl_weight=0.1, learning_rate=1e-2, path=path, teacher=teacher
    )
    bare = BarePolicy(base)
    ahead: dict[str, Any] = {"anchors": anchor_scores(bare, SAMPLES, options)}
    if teacher == "base":
        ahead["targets"] = teacher_targets(bare, SAMPLES, options)
    (metrics, weights), (want, wanted) = trained(base, options, **ahead), trained(base, options)
    assert metrics == want
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


def test_anchors_of_other_texts_and_bases_are_refused(base: Qwen3ForCausalLM) -> None:
    options = Options(top_k=5, steps=1, measure_base_kl=True)
    foreign = [
        (anchor_scores(BarePolicy(base), OTHERS, options), "another prompt"),
        (anchor_scores(BarePolicy(tiny_model(seed=3)), SAMPLES, options), "another base model"),
        (anchor_scores(BarePolicy(base), SAMPLES[:2], options), "2 anchors for 3 samples"),
    ]
    for anchors, said in foreign:
        with pytest.raises(TargetError, match=said):
            trained(base, options, anchors=anchors)
