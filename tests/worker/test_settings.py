"""Settings, and the two vocabularies of training settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from api_schemas.training import PresetName, TrainingSettings, resolve
from sdpo_core.presets import PRESETS
from worker.errors import TrainingFailedError
from worker.mapping import options_of
from worker.settings import from_flags

FLAGS = ["--service-url", "http://127.0.0.1:1", "--model", "/m", "--base-model", "b", "--adapters-root", "/a"]


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERENNIAL_WORKER_BASE_MODEL", "from-environment")
    monkeypatch.setenv("PERENNIAL_WORKER_THREADS", "3")
    (tmp_path / "token").write_text("secret\n")
    settings = from_flags([*FLAGS, "--token-file", str(tmp_path / "token")])
    assert (settings.base_model, settings.threads) == ("b", 3)
    assert settings.read_token() == "secret"
    assert "secret" not in repr(settings)


def test_a_base_is_sharded_over_several_ranks_and_not_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_WORKER_TOKEN", "t")
    with pytest.raises(ValidationError, match="set ranks to 2 or more"):
        from_flags([*FLAGS, "--shard"])
    with pytest.raises(ValidationError, match="do not go together"):
        from_flags([*FLAGS, "--shard", "--ranks", "2", "--quantise", "4bit"])
    with pytest.raises(ValueError, match="leases_at_once"):
        from_flags([*FLAGS, "--ranks", "2", "--leases-at-once", "2"])
    settings = from_flags([*FLAGS, "--shard", "--ranks", "2", "--compile-layers"])
    assert (settings.ranks, settings.shard, settings.compile_layers) == (2, True, True)


@pytest.mark.parametrize("given", [{}, {"PERENNIAL_WORKER_TOKEN": "t", "PERENNIAL_WORKER_TOKEN_FILE": "/f"}])
def test_there_is_exactly_one_token(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match="one of the two"):
        from_flags(FLAGS)


def test_an_empty_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_WORKER_TOKEN", "  ")
    with pytest.raises(ValueError, match="empty"):
        from_flags(FLAGS).read_token()


def test_wrong_settings_end_the_process_with_status_2() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PERENNIAL_")}
    ended = subprocess.run(
        [sys.executable, "-m", "worker", "--service-url", "not a url", "--threads", "0"],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2
    for name in ("service_url", "threads", "adapters_root"):
        assert f"setting {name}:" in ended.stderr


def test_the_supervisor_imports_no_torch() -> None:
    code = "import sys, worker.supervisor, worker.__main__; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=60,
    ).stdout.split()  # fmt: skip
    assert {"torch", "transformers", "peft", "safetensors", "numpy"}.isdisjoint(imported)


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_presets_of_wire_and_algorithm_agree(preset: Any) -> None:
    ours = options_of(resolve(TrainingSettings(preset=preset)))
    theirs = PRESETS[preset]
    differing = {k for k, v in ours.as_dict().items() if v != theirs.as_dict()[k]}
    assert differing == {"measure_base_kl"}, "the service asks for the distance to the base"


def test_every_named_setting_reaches_the_algorithm() -> None:
    wanted = {
        "alpha": 0.25, "support": "student_topk", "top_k": 7, "outside": "renormalise", "is_clip": 3.0, "steps": 5,
        "refresh": False, "base_kl_weight": 0.5, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 9.0,
    }  # fmt: skip
    options = options_of(resolve(TrainingSettings(**wanted))).as_dict()
    assert {k: options[k] for k in wanted} == wanted | {"support": "student"}


def test_the_sampled_token_is_exact_except_in_claas() -> None:
    exact = options_of(resolve(TrainingSettings(support="sampled", alpha=1.0)))
    floored = options_of(resolve(TrainingSettings(preset="claas", support="sampled", alpha=1.0)))
    assert (exact.top_k, floored.top_k) == (None, 100)


def test_what_the_algorithm_refuses_is_not_retried() -> None:
    unchecked = resolve(TrainingSettings()).model_copy(update={"outside": "renormalise"})  # a service of another age
    with pytest.raises(TrainingFailedError) as caught:
        options_of(unchecked)
    assert (caught.value.code, caught.value.retryable) == ("settings_refused", False)
    assert "outside" in str(caught.value)
