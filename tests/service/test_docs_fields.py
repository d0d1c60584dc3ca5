"""docs/api.md says of each field what becomes of it."""

from __future__ import annotations

import re
from pathlib import Path

from api_schemas.chat import ChatRequest
from api_schemas.completions import CompletionRequest
from api_schemas.sampling import REFUSED

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_table_names_every_field() -> None:
    rows = [line for line in API.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    fields = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys() | REFUSED.keys()
    assert fields - named - {"model"} == set()
