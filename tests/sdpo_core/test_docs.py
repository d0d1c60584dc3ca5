"""The example in docs/algorithm.md, run as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sdpo_core
from sdpo_core import Options, attached

ROOT = Path(__file__).parents[2]


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "algorithm.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"out": tmp_path / "adapter"}
    exec(code, names)  # noqa: S102 - our own document
    result = names["result"]
    assert result.updates == Options().steps
    assert result.steps[-1].gap < result.steps[0].gap
    with attached(AutoModelForCausalLM.from_pretrained("demo/model"), tmp_path / "adapter") as policy:
        assert any(bool((p != 0).any()) for n, p in policy.trainable() if ".lora_B." in n)


def test_importing_the_library_needs_nothing_of_the_service() -> None:
    code = "import sdpo_core, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    modules = set(done.stdout.split())
    assert {"fastapi", "sqlalchemy", "pydantic_settings", "service", "worker", "api_schemas"}.isdisjoint(modules)
    assert {"torch", "peft"} <= modules


def test_every_public_name_is_in_the_document() -> None:
    text = (ROOT / "docs" / "algorithm.md").read_text()
    functions = [n for n in sdpo_core.__all__ if n.islower()]
    assert [n for n in functions if n not in text] == []
