"""Taking a standing remark back.

A frozen base teacher knows a preference only because it is told. So taking the remark off the list is enough to turn
the teacher: told what still stands and nothing else, it wants the old behaviour gone wherever the student still shows
it. No counter-remark is invented. Two things follow. The undoing needs batches of fresh answers, since only where the
student still does it is there a gap: build their prompts with `teacher_prompt(..., None, remaining,
standing_teaches=True)`. And it holds for teacher `base` (and `ema` in time); teachers `previous` and `live` carry the
preference in their own weights and will not unlearn it: for those, go back to the version before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_core.errors import RemarkError
from sdpo_core.teacher_context import usable_remarks


def withdraw(standing: Sequence[str], remark: str) -> tuple[str, ...]:
    """The remarks that stand without `remark`, oldest first. Blank space around it does not matter.

    Raises RemarkError when it does not stand: remarks that said the same were dropped in favour of one of them, whose
    words are the ones to withdraw. Raises SampleError for remarks that are no text.
    """
    stand, gone = usable_remarks(standing), "".join(usable_remarks([remark]))
    if gone not in stand:
        raise RemarkError(gone, tuple(stand))
    return tuple(r for r in stand if r != gone)
