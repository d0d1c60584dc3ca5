"""Ids as callers write them: any text is looked up and answered 404, but for NUL, which no database takes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

_NO_NUL = r"^[^\x00]{1,256}$"

PathId = Annotated[str, Path(pattern=_NO_NUL)]
QueryId = Annotated[str | None, Query(pattern=_NO_NUL)]
