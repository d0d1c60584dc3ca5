"""What a batch would teach, token by token, without training on it.

Three views of every response token: the student on the plain prompt, the teacher told the feedback, and the same
teacher not told it. Told against untold says whether the teacher acts on the feedback at all; told against student says
what is left to learn. No gradient, nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.batch_checks import listed_prompts, listed_samples, taught_parts
from sdpo_core.ema import EmaTeacher
from sdpo_core.errors import SampleError
from sdpo_core.given import number
from sdpo_core.options import Options
from sdpo_core.policy import Policy, response_logits
from sdpo_core.samples import Sample
from sdpo_core.scoring import Scorer
from sdpo_core.standing import DEFAULT_EPS


class Decoder(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class TokenView:
    """One response token. Log-probs and distances in nats."""

    id: int
    text: str
    student: float
    """Log-prob under the student, not told."""
    told: float
    """Log-prob under the teacher, told the feedback."""
    untold: float
    """Log-prob under the teacher, not told."""
    distance: float
    """KL(told || student) over the vocabulary: what is left to learn here."""
    effect: float
    """KL(told || untold) over the vocabulary: what the feedback changes here."""
    instead: int
    """The told teacher's most probable token."""
    instead_text: str
    instead_logp: float

    @property
    def gap(self) -> float:
        """told - student: above 0 the teacher wants this token more, below 0 less."""
        return self.told - self.student


@dataclass(frozen=True)
class AnswerView:
    """One sample. `tokens` is empty for a sample that teaches nothing."""

    tokens: tuple[TokenView, ...]
    peak_effect: float
    """Largest effect on a token; 0 without tokens."""


@dataclass(frozen=True)
class Explanation:
    answers: tuple[AnswerView, ...]
    expected_drift: float
    """KL(told || student), mean over response tokens: how far the student's distributions move on these texts if the
    gap is closed. 0 when nothing is taught."""
    acting_tokens: float
    """Share of response tokens on which the feedback changes the teacher by `threshold` nats or more."""
    acting_answers: float
    """Share of taught answers with such a token. Near 0, this feedback teaches nothing."""
    threshold: float


def explain(
    policy: Policy,
    tokenizer: Decoder,
    samples: Sequence[Sample],
    options: Options,
    *,
    ema: EmaTeacher | None = None,
    untold_prompts: Sequence[Sequence[int]] | None = None,
    threshold: float = DEFAULT_EPS,
) -> Explanation:
    """A preview of `train_batch` on the same arguments. The teacher is the one of `options`.

    `untold_prompts`: per sample, what the teacher reads when it is not told this feedback, e.g. what stands already;
    the student's prompts if not given. Raises OptionError when teacher `ema` lacks its state, SampleError when there is
    not one prompt for each sample, ContextTooLong and SampleError for samples that the model cannot read.
    """
    samples = listed_samples(samples)
    number("threshold", threshold)
    prompts = [s.prompt_ids for s in samples] if untold_prompts is None else listed_prompts(untold_prompts)
    if len(prompts) != len(samples):
        raise SampleError(f"{len(prompts)} untold prompts for {len(samples)} samples")
    untold = [replace(s, teacher_prompt_ids=p) for s, p in zip(samples, prompts, strict=True)]
    samples, untold = taught_parts(policy, samples, options), taught_parts(policy, untold, options)
    scorer = Scorer(policy, options, ema)
    live = [i for i, s in enumerate(samples) if s.live]
    views: dict[int, AnswerView] = {}
    for rows in scorer.groups([samples[i] for i in live]) if live else []:
        part = [live[r] for r in rows]
        views.update(
            zip(part, _views(scorer, tokenizer, [samples[i] for i in part], [untold[i] for i in part]), strict=True)
        )
    tokens = [t for view in views.values() for t in view.tokens]
    return Explanation(
        answers=tuple(views.get(i, AnswerView((), 0.0)) for i in range(len(samples))),
        expected_drift=_mean([t.distance for t in tokens]),
        acting_tokens=_mean([float(t.effect >= threshold) for t in tokens]),
        acting_answers=_mean([float(v.peak_effect >= threshold) for v in views.values()]),
        threshold=threshold,
    )


@torch.no_grad()
def _views(scorer: Scorer, tokenizer: Decoder, samples: Sequence[Sample], untold: Sequence[Sample]) -> list[AnswerView]:
    student_BTV = dv.log_probs(response_logits(scorer.policy, scorer.student_batch(samples), adapter=True))
    untold_BTV = scorer.teacher_logp(scorer.teacher_batch(untold))
    told_BTV = scorer.teacher_logp(scorer.teacher_batch(samples))
    found = []
    for b, sample in enumerate(samples):
        n = len(sample.response_ids)
        tokens = _tokens(tokenizer, sample, student_BTV[b, :n], told_BTV[b, :n], untold_BTV[b, :n])
        found.append(AnswerView(tokens, max(t.effect for t in tokens)))
    return found


def _tokens(
    tokenizer: Decoder, sample: Sample, student_TV: Tensor, told_TV: Tensor, untold_TV: Tensor
) -> tuple[TokenView, ...]:
    ids_T = torch.tensor(sample.response_ids, device=student_TV.device)
    best = told_TV.max(-1)
    columns = (
        *(dv.token_log_probs(logp_TV, ids_T).tolist() for logp_TV in (student_TV, told_TV, untold_TV)),
        (told_TV.exp() * (told_TV - student_TV)).sum(-1).tolist(),
        (told_TV.exp() * (told_TV - untold_TV)).sum(-1).tolist(),
        best.indices.tolist(),
        best.values.tolist(),
    )
    return tuple(
        TokenView(
            id=y, text=tokenizer.decode([y]), student=s, told=t, untold=u, distance=distance, effect=effect,
            instead=instead, instead_text=tokenizer.decode([instead]), instead_logp=instead_logp,
        )
        for y, s, t, u, distance, effect, instead, instead_logp in zip(sample.response_ids, *columns, strict=True)
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
