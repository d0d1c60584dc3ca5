"""Teacher conversations from environment signals: a sibling's success, a traceback, or nothing.

Several rollouts of one prompt form a group (same `uid`). A rollout is reprompted with a successful answer of its group
and/or the environment's feedback on it; with neither, its conversation stays and it teaches nothing. Rules:
lasgroup/SDPO ray_trainer.py. Templates are the caller's; only they are formatted, so braces in user text survive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RepromptRules:
    """When a rollout gets a demonstration or feedback, and the words around them."""

    template: str = "{prompt}{solution}{feedback}"
    """Fields: prompt, solution, feedback; the last two are the filled sections below, or empty."""
    solution_template: str = "\n\nA good answer:\n{solution}"
    feedback_template: str = "\n\nWhat happened when your answer was tried:\n{feedback}"
    success_threshold: float = 0.5
    """A score at or above it is a success."""
    exclude_self: bool = True
    """Never show a rollout its own success."""
    use_feedback: bool = True
    feedback_only_without_solution: bool = True
    strip_thinking: bool = True


@dataclass(frozen=True)
class Rollout:
    """One answer of a group: its conversation, its text without special tokens, its score and feedback."""

    messages: Sequence[Message]
    uid: str
    score: float
    response: str
    feedback: Any = None
    """The environment's text; anything but a non-blank string counts as none."""


@dataclass(frozen=True)
class Reprompted:
    """The teacher's conversation and what it contains."""

    messages: list[dict[str, str]]
    has_solution: bool
    has_feedback: bool

    @property
    def taught(self) -> bool:
        return self.has_solution or self.has_feedback


def strip_thinking(text: str) -> str:
    """Remove closed <think> blocks and the whitespace behind each; an unclosed block stays."""
    return _THINKING.sub("", text)


def reprompt(rollouts: Sequence[Rollout], rules: RepromptRules) -> list[Reprompted]:
    """The teacher's conversation of every rollout. The demonstration is the group's first success in batch order."""
    successes: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        if rollout.score >= rules.success_threshold:
            successes.setdefault(rollout.uid, []).append(i)
    return [_reprompt_one(i, rollouts, successes.get(r.uid, []), rules) for i, r in enumerate(rollouts)]


def reprompt_metrics(
    rollouts: Sequence[Rollout], results: Sequence[Reprompted], rules: RepromptRules
) -> dict[str, float]:
    """Shares: groups with a success, rollouts with a demonstration, feedback available and used, rollouts taught."""
    groups = {r.uid for r in rollouts}
    won = {r.uid for r in rollouts if r.score >= rules.success_threshold}
    n = max(len(rollouts), 1)
    return {
        "success_group_fraction": len(won) / max(len(groups), 1),
        "success_sample_fraction": sum(r.has_solution for r in results) / n,
        "feedback_available_fraction": sum(_usable(r.feedback, rules) is not None for r in rollouts) / n,
        "feedback_used_fraction": sum(r.has_feedback for r in results) / n,
        "reprompt_sample_fraction": sum(r.taught for r in results) / n,
    }


def _usable(feedback: Any, rules: RepromptRules) -> str | None:
    return feedback if rules.use_feedback and isinstance(feedback, str) and feedback.strip() else None


def _reprompt_one(i: int, rollouts: Sequence[Rollout], won: Sequence[int], rules: RepromptRules) -> Reprompted:
    rollout = rollouts[i]
    others = [j for j in won if not (rules.exclude_self and j == i)]
    solution = rollouts[others[0]].response if others else None
    if solution is not None and rules.strip_thinking:
        solution = strip_thinking(solution)
    feedback = _usable(rollout.feedback, rules)
    if solution is not None and rules.feedback_only_without_solution:
        feedback = None
    messages = [dict(m) for m in rollout.messages]
    if solution is None and feedback is None:
        return Reprompted(messages, False, False)
    messages[-1]["content"] = rules.template.format(
        prompt=messages[-1]["content"],
        solution="" if solution is None else rules.solution_template.format(solution=solution),
        feedback="" if feedback is None else rules.feedback_template.format(feedback=feedback),
    )
    return Reprompted(messages, solution is not None, feedback is not None)
