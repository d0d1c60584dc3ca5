"""Which tests get the machine to themselves; `make test` runs all the others two at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALONE = [
    HERE / part
    for part in (
        "benchmarks",  # compare times
        "docker/test_by_hand.py",
        "durability/test_kill.py",
        "e2e",
        "service/test_claim_scale.py",
        "vllm",  # a server on both cores
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(part) for part in ALONE):
            item.add_marker(pytest.mark.alone)
