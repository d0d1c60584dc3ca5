"""Secrets from files, as containers mount them: `PERENNIAL_X_FILE` names a file that holds `PERENNIAL_X`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource


class SecretFiles(PydanticBaseSettingsSource):
    """One source of settings. A variable and its file at once are refused: which of them counts would be a guess."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        variable = f"{self.config.get('env_prefix', '')}{field_name}".upper()
        file = os.environ.get(f"{variable}_FILE")
        if not file:
            return None, field_name, False
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both set: give one of the two")
        try:
            return Path(file).read_text(encoding="utf-8").strip(), field_name, False
        except OSError as error:
            raise ValueError(f"{variable}_FILE: {file} cannot be read: {error.strerror}") from error

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}
