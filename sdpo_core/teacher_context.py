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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_core.errors import SampleError
from sdpo_core.messages import listed, text_of

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ContextTemplate:
    """The fixed words around the remarks. Only these words are formatted; user text is inserted verbatim."""

    header: str = "Feedback to follow (the last remark counts most):"
    bullet: str = "- "
    demonstration_header: str = "A good answer:"


DEFAULT_TEMPLATE = ContextTemplate()


def usable_remarks(remarks: Iterable[str]) -> list[str]:
    """Drop blank remarks and exact repeats; of a repeat the newest place is kept. Order: oldest first.

    Raises SampleError `bad_remark` for what is no list, one string too, and for a remark that is no string.
    """
    if isinstance(remarks, str):
        raise SampleError("remarks are a list: put the one remark into one", code="bad_remark")
    if not isinstance(remarks, Iterable):
        raise SampleError(f"remarks are a list, not {type(remarks).__name__}", code="bad_remark")
    remarks = list(remarks)
    for remark in remarks:
        if not isinstance(remark, str):
            raise SampleError(f"a remark is text, not {type(remark).__name__}", code="bad_remark")
    newest_first = dict.fromkeys(r.strip() for r in reversed(remarks) if r.strip())
    return list(reversed(newest_first))


def feedback_block(
    remarks: Sequence[str], demonstration: str | None = None, template: ContextTemplate = DEFAULT_TEMPLATE
) -> str:
    """The text appended to the prompt; empty when there is nothing to tell."""
    if demonstration is not None and not isinstance(demonstration, str):
        raise SampleError(f"a demonstration is text, not {type(demonstration).__name__}", code="bad_remark")
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
) -> list[dict[str, Any]]:
    """The teacher's conversation: `messages` with the block appended to the last user turn, whose content is then text
    (the text parts of a content in parts; sdpo_core.messages).

    With nothing usable to tell, the conversation comes back unchanged (the caller masks such a sample: it teaches
    nothing). Raises SampleError when there is no user turn to attach the block to, or one that is no text.
    """
    told = listed(messages)
    block = feedback_block(remarks, demonstration, template)
    if not block:
        return told
    for i, message in reversed(list(enumerate(told))):
        if message.get("role") == "user":
            message["content"] = f"{text_of(message.get('content'), f'message {i}')}\n\n{block}"
            return told
    raise SampleError("the conversation has no user message to attach feedback to", code="bad_message")
