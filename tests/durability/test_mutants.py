"""Every planted defect's place is there; `make check-mutants` plants them and runs the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.durability.mutants import PLOT
from tests.planted import ROOT, Mutant, plant


@pytest.mark.parametrize("mutant", PLOT.mutants, ids=lambda m: m.name)
def test_the_place_of_every_defect_is_there_once_and_its_tests_too(mutant: Mutant, tmp_path: Path) -> None:
    source = ROOT / mutant.file
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text(source.read_text())
    assert plant(mutant, tmp_path) == source.read_text()
    compile(copy.read_text(), source.name, "exec")
    for name in mutant.first.split():
        file, _, test = name.partition("::")
        found = list(ROOT.glob(f"tests/**/{file}"))
        assert found, f"no {file}"
        assert all(f"def {test}" in path.read_text() for path in found)
