"""Planted defects: does a test notice each of them?

Each defect is an exact text replacement in a temporary copy of the code and its tests; the working tree is never
touched. A text that is not there exactly once is an error, so no list can rot silently. The copy without a defect must
pass first: otherwise every defect would look caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("api_schemas", "demo", "sdpo_core", "service", "tests", "worker")


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file`, the only `old` becomes `new`. `first` are the tests to run before all others, slow ones
    too: files of tests/*/, with `::name` for one test."""

    name: str
    file: str
    old: str
    new: str
    first: str = ""


@dataclass(frozen=True)
class Plot:
    """A set of defects with the tests that are to notice them. Paths are relative to the root of the repository."""

    mutants: tuple[Mutant, ...]
    copied: Sequence[str]
    linked: Sequence[str]
    """What the tests read and no defect is in."""
    tests: Sequence[str]
    package: str = "."
    """Where the defects' files lie."""


def plant(mutant: Mutant, package: Path) -> str:
    """Put the defect in; returns the file's text before. Raises ValueError when the place is not there exactly once."""
    path = package / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the text is {before.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(before.replace(mutant.old, mutant.new))
    return before


def copy_tree(plot: Plot, target: Path) -> None:
    """The code, its tests, and links to what they read."""
    for name in plot.copied:
        source, place = ROOT / name, target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__", "test_mutants.py"))
        else:
            shutil.copy(source, place)
    for name in plot.linked:
        (target / name).symlink_to(ROOT / name)


def run_tests(tree: Path, paths: Sequence[str], *, slow: bool = False) -> str | None:
    """The first failing test, or None when all pass. `slow`: those that are marked so as well.

    In a fork of this process, which has imported the heavy libraries: seconds saved per defect.
    """
    log = tree / "pytest.log"
    child = os.fork()
    if child == 0:
        _pytest(tree, paths, log, "slow or not slow" if slow else "not slow")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return None
    output = log.read_text()
    failed = [line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code not in (1, 2) or not failed:
        raise RuntimeError(f"pytest ended with {code}:\n{output[-2000:]}")
    return failed[0].removeprefix("tests/")


def _pytest(tree: Path, paths: Sequence[str], log: Path, marked: str) -> None:
    """Become pytest in `tree`. Never returns."""
    code = 70
    try:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]  # what has no defect must not be found in its place
        flags = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-m"]  # anyio came in with the heavy libraries
        code = int(pytest.main([*flags, marked, *paths]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hunt(plot: Plot, mutant: Mutant, tree: Path) -> str | None:
    """The test that notices the defect, or None: it survives. Likely tests first, then all fast ones."""
    package = tree / plot.package
    before = plant(mutant, package)
    try:
        likely = [path for name in mutant.first.split() for path in _named(name, tree)]
        return (run_tests(tree, likely, slow=True) if likely else None) or run_tests(tree, plot.tests)
    finally:
        (package / mutant.file).write_text(before)


def _named(name: str, tree: Path) -> list[str]:
    file, colons, test = name.partition("::")
    return [f"{p.relative_to(tree)}{colons}{test}" for p in tree.glob(f"tests/**/{file}")]


def check(plot: Plot, mutants: Sequence[Mutant], *, baseline: bool = True) -> list[str]:
    """Hunt each, print the table, give back the names of the survivors."""
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        copy_tree(plot, tree)
        if baseline and (failed := run_tests(tree, plot.tests)):
            raise SystemExit(f"without any defect, {failed} fails: nothing can be learnt from mutants")
        for mutant in mutants:
            started = time.perf_counter()
            caught = hunt(plot, mutant, tree)
            survivors += [] if caught else [mutant.name]
            seconds = time.perf_counter() - started
            print(f"{mutant.name:42} {caught or 'SURVIVES':90} {seconds:5.1f} s", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} defects caught")
    return survivors


def main(plot: Plot) -> int:
    """The command line of one plot: all its defects, or those named. Exit status 1 if one survives."""
    parser = argparse.ArgumentParser(description="Does a test notice each planted defect?")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a defect first")
    parser.add_argument("names", nargs="*", help="defects by name; all when none is given")
    arguments = parser.parse_args()
    wanted = arguments.names
    if unknown := set(wanted) - {m.name for m in plot.mutants}:
        parser.error(f"no such defect: {', '.join(sorted(unknown))}")
    chosen = [m for m in plot.mutants if not wanted or m.name in wanted]
    return 1 if check(plot, chosen, baseline=not arguments.no_baseline) else 0
