"""Strict in, tolerant out: the two bases of everything that crosses a wire."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints


class Request(BaseModel):
    """What a client sends: an unknown field or a value of the wrong type is an error that names it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Response(BaseModel):
    """What a client receives: unknown fields are dropped, so old clients survive new servers."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


MAX_TEXT = 200_000
MAX_REMARK = 16_000

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT), AfterValidator(_storable)]
Remark = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_REMARK), AfterValidator(_storable), AfterValidator(_not_blank)
]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_storable)]
UserName = Annotated[str, StringConstraints(max_length=256), AfterValidator(_storable)]
"""A caller's own name for an end user."""
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
IdempotencyKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
