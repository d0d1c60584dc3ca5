"""Arguments of public functions: what is of a wrong type or out of bounds is an OptionError with its name."""

from __future__ import annotations

import math
from typing import Any

from sdpo_core.errors import OptionError


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number, `least` or more. A bool is none."""
    if type(value) is not int or value < least:
        raise OptionError(name, f"must be a whole number, {least} or more, not {shown(value)}")
    return value


def number(name: str, value: Any, least: float = 0.0) -> float:
    """A finite number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise OptionError(name, f"must be a finite number, {least:g} or more, not {shown(value)}")
    return float(value)


def a_record(name: str, value: Any, kind: type) -> None:
    """An instance of `kind`."""
    if not isinstance(value, kind):
        raise OptionError(name, f"must be of type {kind.__name__}, not {type(value).__name__}")


def shown(value: Any) -> str:
    """Cut: what was given by mistake may be a whole text."""
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
