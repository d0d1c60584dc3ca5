"""The demonstration does what its table says, and its report holds what others read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from demo.run import Plan, run


@pytest.mark.slow
def test_two_preferences_are_learnt_one_after_the_other(tmp_path: Path) -> None:
    report = run(Plan(), tmp_path / "data", Console(quiet=True))
    assert report["compliance_before"] <= 0.02
    assert report["compliance_after"] >= 0.95
    assert report["content_after"] >= 0.90 * report["content_before"]
    assert report["first_preference_after_second"] >= 0.90
    assert report["second_preference_after"] >= 0.90
    assert report["content_after_second"] >= 0.85 * report["content_before"]
    assert report["versions"] >= 2
    assert report["total_seconds"] < 300
