"""Who may import whom: the import table of the design, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = frozenset({"api_schemas", "benchmarks", "demo", "docker", "sdpo_core", "service", "tests", "worker"})
ALLOWED = {
    "api_schemas": frozenset[str](),
    "sdpo_core": frozenset[str](),
    "service": frozenset({"api_schemas"}),
    "worker": frozenset({"api_schemas", "sdpo_core"}),
}
HEAVY = frozenset({"torch", "transformers", "peft", "safetensors", "tokenizers", "bitsandbytes"})
WITHOUT_TORCH = ("api_schemas", "service")
SUPERVISOR = ("worker/supervisor.py", "worker/__main__.py", "worker/service_client.py", "worker/versions.py")
"""What leases and commits must stay up when training crashes, so it never loads the training libraries."""


STATEFUL = frozenset({"Lock", "Event", "Database", "EngineClient", "AsyncClient", "Settings", "FastAPI", "KeyRing"})


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, inside functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide what is imported"
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_what_the_table_allows(package: str) -> None:
    files = files_of(package)
    assert len(files) > 5
    forbidden = OURS - ALLOWED[package] - {package}
    if package in WITHOUT_TORCH:
        forbidden |= HEAVY
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert found == []


def loaded_by(*modules: str) -> set[str]:
    """Heavy libraries in memory after importing these in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*(set({sorted(HEAVY)!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_service_runs_without_the_training_libraries() -> None:
    assert loaded_by("service.app", "service.cli", "service.context") == set()


def test_the_workers_supervisor_runs_without_the_training_libraries() -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in SUPERVISOR]
    assert loaded_by(*modules) == set()


def test_the_import_check_sees_what_it_should() -> None:
    """The checker itself: an import inside a function of a file that may not."""
    inner = [name for _, name in imported(ROOT / "worker" / "mapping.py")]
    assert "sdpo_core.options" in inner
    assert "api_schemas.training" in inner


def test_http_errors_are_known_in_one_place() -> None:
    """One exception tree, mapped to HTTP where answers are made."""
    users = {
        path.name
        for path in files_of("service")
        if any(isinstance(n, ast.Name) and n.id == "HTTPException" for n in ast.walk(ast.parse(path.read_text())))
    }
    assert users == {"problems.py"}


def test_nothing_is_opened_at_import() -> None:
    """No client, lock or database is made when a module of the service is imported."""
    made = []
    for path in files_of("service"):
        for node in ast.parse(path.read_text()).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Call):
                name = ast.unparse(value.func)
                if name.rsplit(".", 1)[-1] in STATEFUL:
                    made.append(f"{path.name}:{node.lineno}: {name}")
    assert made == []
