"""What the library raises. One base; each has a stable code and says what to do."""

from __future__ import annotations

from typing import Any


class SdpoError(ValueError):
    """Base of every error this library raises on purpose."""

    code = "sdpo_error"
    """Stable; the words may change. A class has one for all that it says, unless an error names its own."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class OptionError(SdpoError):
    """An option out of bounds or of a wrong type, or a combination that trains nothing or is known to collapse."""

    code = "option_refused"

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.option, self.reason)


class SampleError(SdpoError):
    """A sample, a message or a remark whose parts do not fit together.

    Codes: `bad_sample`, `unknown_token` (an id outside the vocabulary), `bad_message`, `unsupported_content` (a part of
    a message that is no text), `bad_text` (no valid Unicode), `template_refused` (by the model's chat template),
    `bad_remark`.
    """

    code = "bad_sample"


class TargetError(SampleError):
    """Teacher targets that were scored for something else than what they are given for."""

    code = "foreign_targets"


class ContextTooLong(SdpoError):
    """The prompt, with the response to score behind it, does not fit the model's window."""

    code = "context_too_long"

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"the context has {length} tokens, the limit is {limit}: shorten the messages or the feedback")
        self.length = length
        self.limit = limit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.length, self.limit)


class AdapterError(SdpoError):
    """A base model that cannot carry an adapter, or adapter files or optimizer state that belong to another.

    Codes: `foreign_adapter` (files), `foreign_optimizer`, `second_adapter`, `unsupported_base`, `unknown_module`,
    `base_not_finite`, `base_changed`, `no_moving_average` (teacher `ema` on layers that it cannot follow),
    `adapter_detached` (a policy whose adapter was taken off).
    """

    code = "foreign_adapter"


class RemarkError(SdpoError):
    """A remark that does not stand."""

    code = "remark_does_not_stand"

    def __init__(self, remark: str, standing: tuple[str, ...]) -> None:
        super().__init__(f"the remark does not stand: withdraw one of the {len(standing)} that do, in its own words")
        self.remark = remark
        self.standing = standing

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.remark, self.standing)
