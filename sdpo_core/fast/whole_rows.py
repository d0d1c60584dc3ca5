"""Supports that need a teacher's whole distribution: the student's own top K, and the full vocabulary.

A row as wide as the vocabulary is not kept of any token. What the head was given for the teacher is kept instead
(`Target.states`), and the teacher's logits are made of it again, a chunk at a time, beside the student's: one more head
product per step. On the student's top K the loss is then what it is on the teacher's, with other tokens kept.

Shape legend: N tokens of a chunk, H hidden width, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.fast.rows_triton import rows_for

Logits = Callable[[Tensor], Tensor]
"""The output head: (N, H) to (N, V)."""


def kept(logits_NV: Tensor, index_NK: Tensor, ids_N: Tensor) -> Target:
    """The log-probs at these tokens and of all others together, without a copy of the logits."""
    stats = rows_for(logits_NV).row_stats(logits_NV, index_NK, ids_N)
    logp_NK = (stats.picked_NK - stats.lse_N.unsqueeze(-1)).clamp(min=dv.LOGP_FLOOR)
    return Target(logp_NK, index_NK, (stats.rest_N - stats.lse_N).clamp(min=dv.TAIL_FLOOR))


def on_students_tokens(
    student_NV: Tensor, target: Target, ids_N: Tensor, spec: DivergenceSpec, logits: Logits
) -> Target:
    """The teacher at the student's top K, as a target for support "teacher"."""
    index_NK = dv.top_k_indices(student_NV, spec.top_k)
    teacher_NV = target.logp if target.states is None else logits(target.states)
    return replace(kept(teacher_NV, index_NK, ids_N), gap=target.gap)


def with_whole_rows(target: Target, logits: Logits) -> Target:
    """The same target with the teacher's log-probs of the whole vocabulary, where its states were kept."""
    return target if target.states is None else Target(dv.log_probs(logits(target.states)), gap=target.gap)


def with_states(gap: Target, states_NH: Tensor) -> Target:
    """What is kept of a teacher whose rows will be read again."""
    return Target(gap.logp[..., 0], gap=gap, states=states_NH)
