"""What the teacher is told and the student is not.

The teacher is the same model with feedback in its context. It sees the student's messages unchanged, except that a
block of remarks is appended to the last user message:

    <prompt>

    Feedback to follow (the last remark counts most):
    - <oldest standing remark>
    - <remark on this very answer>

    A good answer:
    <demonstration>

Standing feedback (remarks that earlier versions were trained on) comes first and the newest remark last: a teacher
that is told only the newest remark pulls the adapter away from everything it learnt before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]


@dataclass(frozen=True)
class ContextTemplate:
    """The fixed words around the remarks. Only these words are formatted; user text is inserted verbatim."""

    header: str = "Feedback to follow (the last remark counts most):"
    bullet: str = "- "
    demonstration_header: str = "A good answer:"


DEFAULT_TEMPLATE = ContextTemplate()


def usable_remarks(remarks: Sequence[str]) -> list[str]:
    """Drop blank remarks and exact repeats; of a repeat the newest place is kept. Order: oldest first."""
    newest_first = dict.fromkeys(r.strip() for r in reversed(remarks) if r.strip())
    return list(reversed(newest_first))


def feedback_block(
    remarks: Sequence[str], demonstration: str | None = None, template: ContextTemplate = DEFAULT_TEMPLATE
) -> str:
    """The text appended to the prompt; empty when there is nothing to tell."""
    parts = []
    if told := usable_remarks(remarks):
        parts.append("\n".join([template.header, *(template.bullet + r for r in told)]))
    if demonstration and demonstration.strip():
        parts.append(f"{template.demonstration_header}\n{demonstration.strip()}")
    return "\n\n".join(parts)


def teacher_messages(
    messages: Sequence[Message],
    remarks: Sequence[str],
    demonstration: str | None = None,
    template: ContextTemplate = DEFAULT_TEMPLATE,
) -> list[dict[str, str]]:
    """The teacher's conversation: `messages` with the block appended to the last user turn.

    With nothing usable to tell, the conversation comes back unchanged (the caller masks such a sample: it teaches
    nothing). Raises ValueError when there is no user turn to attach the block to.
    """
    told = [dict(m) for m in messages]
    block = feedback_block(remarks, demonstration, template)
    if not block:
        return told
    for message in reversed(told):
        if message["role"] == "user":
            message["content"] = f"{message['content']}\n\n{block}"
            return told
    raise ValueError("the conversation has no user message to attach feedback to")
