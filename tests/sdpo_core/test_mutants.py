"""A few planted defects on every full run; `make check-mutants` has them all."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
SOME = ("swapped mixture", "mean of micro-batch means", "average of the factors")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sdpo_mutants", HERE / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


mutants = _load()


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_the_place_of_every_defect_is_there_once(mutant: object, tmp_path: Path) -> None:
    """Cheap, so that a change of the library that moves a place is told at once."""
    source = HERE.parents[1] / "sdpo_core" / mutant.file  # type: ignore[attr-defined]
    (tmp_path / source.name).write_text(source.read_text())
    before = mutants.plant(mutant, tmp_path)
    assert before == source.read_text()
    compile((tmp_path / source.name).read_text(), source.name, "exec")
    assert (tmp_path / source.name).read_text() != before


def test_a_defect_without_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="0 times"):
        mutants.plant(mutants.Mutant("x", "loop.py", "some text", "other"), tmp_path)


@pytest.mark.slow
def test_some_defects_are_noticed() -> None:
    """In a process of its own: here the library without defects is already imported."""
    command = [sys.executable, str(HERE / "mutants.py"), "--no-baseline", *SOME]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SOME)} of {len(SOME)} defects caught" in done.stdout
