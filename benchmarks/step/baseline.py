# ruff: noqa: N815 - shape suffixes on fields
"""The plain baseline, written from its description in reference/SPEED.md and from nothing else.

"One sample at a time, base and teacher and student forwards over all positions, log_softmax over all positions, all
graphs held until one backward, gradient checkpointing on, a refresh forward after each step."

The base and the teacher are scored once per batch and the refresh is left out after the last step, where nothing reads
it: SPEED.md's own count of the arithmetic (664 and 2184 TFLOP for one step and four) has it so. Its mathematics is
that of sdpo_core, in the words of a textbook: what the two differ by is rounding, and the benchmark shows it.

Shapes: N tokens of prompt and answer, T of the answer, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from sdpo_core import Options, Sample


@dataclass(frozen=True)
class Frozen:
    """What is scored once per sample."""

    teacher_TK: Tensor
    """Teacher log-probs of its top K, renormalised over them."""
    index_TK: Tensor
    base_T: Tensor
    """Base log-probs of the answer; the distance to the base is reported, its weight is 0."""


def baseline_batch(model: PeftModel, samples: Sequence[Sample], options: Options, steps: int) -> list[float]:
    """Train `steps` steps on one batch and give each step's loss. Gradients of the last step stay where they are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    behaviour = [torch.tensor(s.behaviour_logprobs, device=model.device) for s in samples]
    losses = []
    with checkpointed(model):
        frozen = [score(model, sample, options) for sample in samples]
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = batch_loss(model, samples, frozen, behaviour, options)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
            if step < steps:
                behaviour = [refreshed(model, sample) for sample in samples]
    return losses


@contextmanager
def checkpointed(model: PeftModel) -> Iterator[None]:
    """Gradient checkpointing of every layer; it needs train mode, and there is no dropout that this would switch on."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.activation_checkpointing_disable()


def log_probs(model: PeftModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """(N, V): log_softmax over the vocabulary at every position."""
    ids_1N = torch.tensor([[*prompt, *response]], device=model.device)
    logits_NV = model(input_ids=ids_1N, use_cache=False).logits[0]
    return torch.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), dim=-1)


def of_response(logp_NV: Tensor, sample: Sample, prompt: Sequence[int]) -> Tensor:
    """(T, V): the rows that predict the answer's tokens."""
    return logp_NV[len(prompt) - 1 : len(prompt) - 1 + len(sample.response_ids)]


def chosen(logp_TV: Tensor, sample: Sample) -> Tensor:
    """(T,): log-probs of the answer's own tokens."""
    return logp_TV.gather(-1, torch.tensor(sample.response_ids, device=logp_TV.device).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def score(model: PeftModel, sample: Sample, options: Options) -> Frozen:
    """Teacher and base: the model without the adapter, behind the told and the plain prompt."""
    assert options.top_k is not None
    with model.disable_adapter():
        teacher_NV = log_probs(model, sample.teacher_prompt_ids, sample.response_ids)
        base_NV = log_probs(model, sample.prompt_ids, sample.response_ids)
    top = of_response(teacher_NV, sample, sample.teacher_prompt_ids).topk(options.top_k, dim=-1)
    teacher_TK = torch.log_softmax(top.values, dim=-1)
    return Frozen(teacher_TK, top.indices, chosen(of_response(base_NV, sample, sample.prompt_ids), sample))


@torch.no_grad()
def refreshed(model: PeftModel, sample: Sample) -> Tensor:
    """(T,): the answer's log-probs under the weights as they are now."""
    logp_NV = log_probs(model, sample.prompt_ids, sample.response_ids)
    return chosen(of_response(logp_NV, sample, sample.prompt_ids), sample)


def batch_loss(
    model: PeftModel, samples: Sequence[Sample], frozen: Sequence[Frozen], behaviour: Sequence[Tensor], options: Options
) -> Tensor:
    """The mean over all the batch's answer tokens of divergence times clipped ratio; every sample's graph is held."""
    losses = []
    for sample, fixed, behaviour_T in zip(samples, frozen, behaviour, strict=True):
        logp_NV = log_probs(model, sample.prompt_ids, sample.response_ids)
        logp_TV = of_response(logp_NV, sample, sample.prompt_ids)
        losses.append(sample_loss(logp_TV, chosen(logp_TV, sample), fixed, behaviour_T, options))
    return torch.stack(losses).sum() / sum(len(s.response_ids) for s in samples)


def sample_loss(logp_TV: Tensor, own_T: Tensor, fixed: Frozen, behaviour_T: Tensor, options: Options) -> Tensor:
    """Divergence times clipped ratio, summed over an answer's tokens; `own_T` are their log-probs."""
    student_TK = torch.log_softmax(logp_TV.gather(-1, fixed.index_TK), dim=-1)
    divergence_T = jensen_shannon(student_TK, fixed.teacher_TK, options.alpha)
    ratio_T = (own_T.detach() - behaviour_T).exp().clamp(max=options.is_clip)
    to_base_T = (own_T - fixed.base_T).exp() - 1.0 - (own_T - fixed.base_T)
    return (divergence_T * ratio_T + options.base_kl_weight * to_base_T).sum()


def jensen_shannon(student_K: Tensor, teacher_K: Tensor, alpha: float) -> Tensor:
    """(..., K) log-probs -> (...): (1 - alpha) KL(S||M) + alpha KL(T||M), M = (1 - alpha) S + alpha T."""
    mixture_K = torch.logaddexp(student_K + math.log(1 - alpha), teacher_K + math.log(alpha))
    to_student = (student_K.exp() * (student_K - mixture_K)).sum(-1)
    to_teacher = (teacher_K.exp() * (teacher_K - mixture_K)).sum(-1)
    return (1 - alpha) * to_student + alpha * to_teacher
