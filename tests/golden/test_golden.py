"""The public golden vectors, through the library. `python tests/golden/check.py --set public --adapter
tests/golden/adapter.py:adapter` from the project's root does the same from the shell."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
REQUIRED = ("verl_sdpo", "claas_sdpo", "claas_steps", "agg", "ema", "trust_region")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def _results() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = _module("check").run(HERE / "public", _module("adapter").adapter)
    return results


def _cases() -> list[str]:
    return [case["name"] for case in _module("check").load(HERE / "public").index["cases"]]


@pytest.mark.parametrize("name", _cases())
def test_case(name: str) -> None:
    result = next(r for r in _results() if r["name"] == name)
    failed = {n: q for n, q in result["quantities"].items() if not q["ok"]}
    assert result["status"] == "ok", (result.get("error"), failed)


@pytest.mark.parametrize("family", REQUIRED)
def test_required_family_is_there_in_full(family: str) -> None:
    statuses = [r["status"] for r in _results() if r["family"] == family]
    assert statuses
    assert set(statuses) == {"ok"}
