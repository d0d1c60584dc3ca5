"""Sampling against its definition: which tokens may come, how often, and that neighbours do not matter."""

import math

import pytest
import torch

from worker.engine.sampling import Sampling, draw, filtered, new_generator

CPU = torch.device("cpu")
PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]


def logits(rows: int = 1) -> torch.Tensor:
    return torch.tensor([PROBS]).log().expand(rows, -1).clone()


def kept(sampling: Sampling) -> list[int]:
    return filtered(logits(), [sampling])[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.35}, [0]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.001}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 1]),  # of the three that top_k leaves, 0.4 / 0.85 is less than 0.6
    ],
)
def test_filters_keep(options: dict[str, float], wanted: list[int]) -> None:
    assert kept(Sampling(**options)) == wanted


def test_filters_of_one_row_leave_the_others_alone() -> None:
    samplings = [Sampling(), Sampling(top_k=1), Sampling(top_p=0.5, temperature=2.0), Sampling(min_p=0.5)]
    together = filtered(logits(4), samplings)
    for row, sampling in zip(together, samplings, strict=True):
        assert torch.equal(row, filtered(logits(), [sampling])[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=7)
    generator = new_generator(sampling, CPU)
    count = 4000
    drawn = [draw(logits(), [sampling], [generator], [0])[0].token_id for _ in range(count)]
    weights = [prob ** (1 / temperature) for prob in PROBS]
    # Pearson's statistic with 4 degrees of freedom; 23.5 is exceeded once in 10,000 seeds.
    statistic = sum(
        (drawn.count(token) - count * weight / sum(weights)) ** 2 / (count * weight / sum(weights))
        for token, weight in enumerate(weights)
    )
    assert statistic < 23.5


def test_seeded_rows_do_not_depend_on_the_batch() -> None:
    samplings = [Sampling(seed=seed, temperature=1.5, top_p=0.9 if seed % 2 else 1.0) for seed in range(6)]
    together = [new_generator(sampling, CPU) for sampling in samplings]
    alone = [new_generator(sampling, CPU) for sampling in samplings]
    for _ in range(20):
        batch = draw(logits(6), samplings, together, [0] * 6)
        single = [draw(logits(), [one], [own], [0])[0] for one, own in zip(samplings, alone, strict=True)]
        assert [one.token_id for one in batch] == [one.token_id for one in single]


def test_reported_logprobs_are_raw() -> None:
    sampling = Sampling(temperature=0.3, top_k=2, seed=1)
    drawn = draw(logits() + 5.0, [sampling], [new_generator(sampling, CPU)], [3])[0]
    assert drawn.logprob == pytest.approx(math.log(PROBS[drawn.token_id]), abs=1e-6)
    assert [token for token, _ in drawn.top] == [0, 1, 2]
    assert [math.exp(logprob) for _, logprob in drawn.top] == pytest.approx(PROBS[:3], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_with_broken_logits_is_reported_and_the_others_are_drawn(bad: float) -> None:
    rows = logits(3)
    rows[1, 2] = bad
    samplings = [Sampling(temperature=0), Sampling(seed=1), Sampling(temperature=0)]
    drawn = draw(rows, samplings, [None, new_generator(samplings[1], CPU), None], [0, 0, 0])
    assert [one if one is None else one.token_id for one in drawn] == [0, None, 0]


def test_masked_tokens_are_not_broken_logits() -> None:
    rows = logits()
    rows[0, 0] = -math.inf
    assert draw(rows, [Sampling(temperature=0)], [None], [0])[0].token_id == 1
