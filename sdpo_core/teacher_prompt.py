"""The teacher's prompt as token ids, within the model's window.

Where it does not fit, the oldest standing remarks go first. The item's own remark, the conversation and the header
that opens the answer are never cut: a teacher that scores the answer after a truncated prompt teaches noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_core.chat import ChatTokenizer, chat_ids
from sdpo_core.errors import ContextTooLong
from sdpo_core.given import whole
from sdpo_core.teacher_context import (
    DEFAULT_TEMPLATE,
    ContextTemplate,
    feedback_block,
    teacher_messages,
    usable_remarks,
)


@dataclass(frozen=True)
class TeacherPrompt:
    """What the teacher sees before the response."""

    ids: tuple[int, ...]
    remarks: tuple[str, ...]
    """Remarks told, oldest first."""
    dropped: tuple[str, ...]
    """Standing remarks left out because they did not fit, oldest first."""
    taught: bool
    """Whether there is anything to teach; False: mask the sample."""


def teacher_prompt(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    feedback: str | None,
    standing: Sequence[str] = (),
    *,
    limit: int,
    demonstration: str | None = None,
    repetitions: int = 1,
    standing_teaches: bool = False,
    template: ContextTemplate = DEFAULT_TEMPLATE,
    tools: Sequence[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> TeacherPrompt:
    """Render the conversation with standing remarks and the item's own feedback in its last user turn.

    `repetitions`: how often the item's own feedback is said, joined by a space (CLaaS). `standing_teaches`: an item
    without feedback of its own is taught as well, by what stands; that is how a withdrawn remark is unlearnt.
    `limit` is the number of tokens the prompt may have: the model's window less the response. Raises ContextTooLong
    with both lengths when it does not fit even without standing remarks, OptionError for fewer than one repetition or a
    limit that is no whole number, SampleError for a conversation or remarks as in `chat_ids` and `teacher_messages`.
    """
    whole("repetitions", repetitions)
    whole("limit", limit, None)
    own = usable_remarks(["" if feedback is None else feedback])
    shown = feedback_block([], demonstration, template)
    taught = standing_teaches or bool(own) or bool(shown)
    older = [r for r in usable_remarks(standing) if r not in own]
    for first in range(len(older) + 1):
        told = [*older[first:], *own]
        said = [*older[first:], *(" ".join([r] * repetitions) for r in own)]
        ids = chat_ids(
            tokenizer,
            teacher_messages(messages, said, demonstration, template),
            tools=tools,
            template_options=template_options,
        )
        if len(ids) <= limit:
            return TeacherPrompt(tuple(ids), tuple(told), tuple(older[:first]), taught)
    raise ContextTooLong(len(ids), limit)
