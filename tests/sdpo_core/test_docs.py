"""The example in docs/algorithm.md, run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

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
