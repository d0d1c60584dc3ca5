"""What the library raises. One base; each says what to do."""

from __future__ import annotations


class SdpoError(ValueError):
    """Base of every error this library raises on purpose."""


class OptionError(SdpoError):
    """An option out of bounds, or a combination that trains nothing or is known to collapse."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason


class SampleError(SdpoError):
    """A sample whose parts do not fit together."""


class ContextTooLong(SdpoError):
    """The prompt, with the response to score behind it, does not fit the model's window."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"the context has {length} tokens, the limit is {limit}: shorten the messages or the feedback")
        self.length = length
        self.limit = limit


class AdapterError(SdpoError):
    """An adapter directory or optimizer state that does not belong to this base model or adapter."""


class RemarkError(SdpoError):
    """A remark that does not stand."""

    def __init__(self, remark: str, standing: tuple[str, ...]) -> None:
        super().__init__(f"the remark does not stand: withdraw one of the {len(standing)} that do, in its own words")
        self.remark = remark
        self.standing = standing
