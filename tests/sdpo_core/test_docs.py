"""The example in docs/algorithm.md, run as it is printed."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert {"fastapi", "sqlalchemy", "pydantic_settings", "service", "worker", "api_schemas"}.isdisjoint(modules)
    assert {"torch", "peft"} <= modules


API = (ROOT / "docs" / "sdpo_core.md").read_text()
CALLS = {name: given for name, given in re.findall(r"`(\w+)\(([^)]*)\)`", API) if hasattr(sdpo_core, name)}
WITHOUT_PARAMETERS = {"PRESETS", "Policy", "Options"}


def test_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the page, as it is printed: the remark is learnt somewhat, and the adapter loads."""
    (code,) = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    statements = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt) and not isinstance(n, ast.ImportFrom)]
    assert len(statements) <= 10
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"out": str(tmp_path / "adapter")}
    exec(code, names)  # noqa: S102 - our own document
    steps = names["result"].steps
    assert steps[-1].gap < steps[0].gap
    with attached(names["model"], tmp_path / "adapter") as policy:
        assert any(bool((p != 0).any()) for n, p in policy.trainable() if ".lora_B." in n)


def test_every_public_name_is_on_the_page_with_its_parameters() -> None:
    assert set(CALLS) | WITHOUT_PARAMETERS == set(sdpo_core.__all__)
    for name in WITHOUT_PARAMETERS:
        assert f"`{name}" in API
    for name, given in CALLS.items():
        if name not in WITHOUT_PARAMETERS:
            assert given.split(", ") == shown(getattr(sdpo_core, name)), name


def shown(call: Any) -> list[str]:
    """Parameter names as a signature has them: those behind the star go by name alone, two stars take any."""
    names: list[str] = []
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(f"**{name}" if parameter.kind is inspect.Parameter.VAR_KEYWORD else name)
    return names


def test_every_option_is_in_the_table() -> None:
    table = API[API.index("| option |") : API.index("## What comes back")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(f.name for f in fields(Options))


def test_every_error_code_is_on_the_page() -> None:
    """Each that a class or a `raise` of the library names."""
    source = "\n".join(path.read_text() for path in (ROOT / "sdpo_core").rglob("*.py"))
    named = set(re.findall(r'code ?= ?"(\w+)"', source)) - {"sdpo_error"}
    table = API[API.index("## Errors") :]
    assert named == set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table[: table.index("Formulas")]))
