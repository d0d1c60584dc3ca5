"""Arguments of public functions: what is of a wrong type or out of bounds is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

from sdpo_core.errors import OptionError, SampleError

R = TypeVar("R")


def whole(name: str, value: Any, least: int | None = 1) -> int:
    """A whole number, `least` or more. A bool is none. Raises OptionError."""
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f", {least} or more"
        raise OptionError(name, f"must be a whole number{bound}, not {shown(value)}")
    return value


def number(name: str, value: Any) -> float:
    """A finite number, 0 or more. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise OptionError(name, f"must be a finite number, 0 or more, not {shown(value)}")
    return float(value)


def a_record(name: str, value: Any, kind: type) -> None:
    """An instance of `kind`. Raises OptionError."""
    if not isinstance(value, kind):
        raise OptionError(name, f"must be of type {kind.__name__}, not {type(value).__name__}")


def a_policy(value: Any, *parts: str) -> None:
    """What has these methods; none named: those of `Policy`. Raises OptionError."""
    if not all(callable(getattr(value, part, None)) for part in parts or ("logits", "trainable")):
        raise OptionError("policy", f"must be a Policy such as attach_lora makes, not {type(value).__name__}")


def listed(name: str, values: Iterable[R], kind: type[R]) -> list[R]:
    """A list of `kind`, out of anything that can be read once: they are read more than once. Raises SampleError."""
    one = isinstance(values, kind | str)
    try:
        found = [] if one else list(values)
    except TypeError:
        one, found = True, []
    if one or not all(isinstance(value, kind) for value in found):
        raise SampleError(f"{name} are a list of {kind.__name__}")
    return found


def shown(value: Any) -> str:
    """Cut: what was given by mistake may be a whole text."""
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
