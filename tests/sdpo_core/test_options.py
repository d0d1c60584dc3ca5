"""Options: bounds, refusals by name, presets, round trips."""

from __future__ import annotations

from typing import Any

import pytest

from sdpo_core import PRESETS, OptionError, Options, claas, lasgroup


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("alpha", {"alpha": 1.01}),
        ("alpha", {"alpha": float("nan")}),
        ("alpha", {"support": "sampled", "alpha": 0.5}),
        ("support", {"support": "nearest"}),
        ("support", {"support": "student", "alpha": 0.0}),
        ("outside", {"outside": "drop"}),
        ("outside", {"outside": "renormalise", "alpha": 0.0}),
        ("top_k", {"outside": "renormalise", "alpha": 0.5, "top_k": 1}),
        ("top_k", {"support": "student", "outside": "renormalise", "alpha": 0.5, "top_k": 1}),
        ("top_k", {"top_k": None}),
        ("top_k", {"top_k": 0}),
        ("is_clip", {"is_clip": 0.5}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 65}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("betas", {"betas": (0.9, 1.0)}),
        ("weight_decay", {"weight_decay": -0.1}),
        ("max_grad_norm", {"max_grad_norm": 0.0}),
        ("base_kl_weight", {"base_kl_weight": -1.0}),
        ("aggregation", {"aggregation": "mean"}),
        ("stop_gap", {"stop_gap": -1.0}),
        ("stop_gap_ratio", {"stop_gap_ratio": 1.0}),
        ("teacher_mix", {"teacher_mix": 1.5}),
        ("micro_batch_tokens", {"micro_batch_tokens": 0}),
    ],
)
def test_refused_by_name_with_a_reason(option: str, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**values)
    assert caught.value.option == option
    assert caught.value.reason


def test_claas_at_alpha_zero_is_refused_and_at_one_is_the_sampled_branch() -> None:
    with pytest.raises(OptionError, match="identically zero"):
        claas(0.0)
    assert claas(1.0).support == "sampled"
    assert claas(1.0).top_k == 100


def test_presets_carry_no_known_collapse() -> None:
    assert set(PRESETS) == {"default", "claas", "lasgroup"}
    assert PRESETS["default"] == Options()
    assert PRESETS["default"].cautions == ()
    with pytest.raises(TypeError):
        PRESETS["default"] = claas()  # type: ignore[index]


def test_published_settings() -> None:
    ours, theirs = PRESETS["claas"], PRESETS["lasgroup"]
    assert (ours.alpha, ours.support, ours.outside, ours.is_clip, ours.steps) == (0.5, "teacher", "renormalise", 5.0, 1)
    assert (ours.learning_rate, ours.betas, ours.weight_decay) == (3e-5, (0.9, 0.999), 0.01)
    assert (theirs.support, theirs.outside, theirs.is_clip, theirs.aggregation) == (
        "student",
        "tail",
        2.0,
        "token-mean",
    )
    assert lasgroup(1.0).alpha == 1.0


def test_round_trip_and_unknown_names() -> None:
    options = Options(alpha=0.25, betas=(0.8, 0.95), is_clip=None)
    assert Options.from_dict(options.as_dict()) == options
    with pytest.raises(OptionError, match="no such option") as caught:
        Options.from_dict({"learing_rate": 1e-3})
    assert caught.value.option == "learing_rate"


def test_changes_are_checked_again() -> None:
    with pytest.raises(OptionError):
        Options().replace(alpha=2.0)


def test_cautions_name_the_risk() -> None:
    assert any("teacher_mix" in c for c in Options(teacher_mix=1.0).cautions)
    assert any("alpha" in c for c in Options(alpha=0.5).cautions)
    assert any("support" in c for c in Options(alpha=1.0, support="sampled", top_k=None).cautions)
