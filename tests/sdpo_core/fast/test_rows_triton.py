"""The Triton kernels without a GPU: run in triton's interpreter, and compiled for a Hopper GPU.

On a GPU `python -m benchmarks.step --gpu` prints their error and time there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_core.fast import rows, rows_triton

ROOT = Path(__file__).parents[3]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process, from the repository's root."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_results_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("interpreted.py")
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


def test_imports_without_triton() -> None:
    """The module names the kernels only when it launches one."""
    code = "import sys; sys.modules['triton'] = None; import sdpo_core.fast.rows_triton as rows; print(rows.usable)"
    done = run("-c", code)
    assert "function usable" in done.stdout, done.stderr


def test_without_a_gpu_triton_does_not_work() -> None:
    code = "import logging; logging.basicConfig(); from sdpo_core.fast import rows_triton as r; print(r.works())"
    done = run("-c", code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout == "False\n", done.stderr
    assert "in the place of triton's" in done.stderr


@pytest.mark.parametrize(
    "error", [None, RuntimeError("Failed to find C compiler"), ImportError("cuda_utils.so: file too short")]
)
def test_the_torch_versions_run_where_triton_cannot_build_or_load(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Asked of logits that say they are on a GPU."""

    class Active:
        @property
        def utils(self) -> object:
            if error is not None:
                raise error
            return object()

    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=Active())))
    rows_triton.works.cache_clear()
    found = rows_triton.rows_for(on_gpu)
    rows_triton.works.cache_clear()
    assert found.row_stats is (rows_triton if error is None else rows).row_stats


@pytest.mark.slow
def test_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    """To machine code, which needs no GPU."""
    done = run("-m", "benchmarks.step.machine_code", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "row_stats_kernel bf16 sm_90: 1 exponential per logit, 0 bytes spilled",
        "row_stats_kernel fp32 sm_90: 1 exponential per logit, 0 bytes spilled",
        "row_grad_kernel bf16 sm_90: 1 exponential per logit, 0 bytes spilled",
        "row_grad_kernel fp32 sm_90: 1 exponential per logit, 0 bytes spilled",
    ]
