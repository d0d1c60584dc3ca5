"""A few planted defects on every full run; `make check-mutants` has them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted import Mutant, plant
from tests.sdpo_core.mutants import PLOT

HERE = Path(__file__).parent
SOME = ("swapped mixture", "mean of micro-batch means", "average of the factors")


@pytest.mark.parametrize("mutant", PLOT.mutants, ids=lambda m: m.name)
def test_the_place_of_every_defect_is_there_once(mutant: Mutant, tmp_path: Path) -> None:
    """Cheap, so that a change of the library that moves a place is told at once."""
    source = HERE.parents[1] / "sdpo_core" / mutant.file
    copy = tmp_path / mutant.file
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(source.read_text())
    before = plant(mutant, tmp_path)
    assert before == source.read_text()
    compile(copy.read_text(), source.name, "exec")
    assert copy.read_text() != before


def test_a_defect_without_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="0 times"):
        plant(Mutant("x", "loop.py", "some text", "other"), tmp_path)


@pytest.mark.slow
def test_some_defects_are_noticed() -> None:
    """In a process of its own: here the library without defects is already imported."""
    command = [sys.executable, "-m", "tests.sdpo_core.mutants", "--no-baseline", *SOME]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SOME)} of {len(SOME)} defects caught" in done.stdout
