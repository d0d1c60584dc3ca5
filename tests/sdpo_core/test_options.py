"""Options: bounds, refusals by name, presets, round trips."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from typing import Any

import pytest

from sdpo_core import PRESETS, OptionError, Options, PolicyGradient, claas, lasgroup
from sdpo_core.presets import claas_hosted, openclaw_combined

SAMPLED: dict[str, Any] = {"alpha": 1.0, "support": "sampled", "top_k": None, "is_clip": None}


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
        ("teacher_mix", {"teacher_mix": 0.1, "teacher": "live"}),
        ("teacher", {"teacher": "wise"}),
        ("teacher_rate", {"teacher_rate": 1.1}),
        ("teacher_rank", {"teacher_rank": 0}),
        ("previous_kl_weight", {"previous_kl_weight": 0.1, "steps": 1}),
        ("top_entropy", {"top_entropy": 0.0}),
        ("rollout_correction", {"rollout_correction": "batch"}),
        ("rollout_threshold", {"rollout_threshold": 0.5}),
        ("policy_gradient", {"policy_gradient": PolicyGradient()}),
        ("is_clip", {**SAMPLED, "is_clip": 2.0, "policy_gradient": PolicyGradient()}),
        ("policy_gradient.reference", {**SAMPLED, "policy_gradient": PolicyGradient(reference="god")}),  # type: ignore[arg-type]
        ("policy_gradient.clip_low", {**SAMPLED, "policy_gradient": PolicyGradient(clip_low=0.2)}),
        ("policy_gradient.distill_weight", {**SAMPLED, "policy_gradient": PolicyGradient(distill_weight=0.0)}),
        ("policy_gradient.max_gain", {**SAMPLED, "policy_gradient": PolicyGradient(max_gain=0.5)}),
        ("micro_batch_tokens", {"micro_batch_tokens": 0}),
    ],
)
def test_refused_by_name_with_a_reason(option: str, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**values)
    assert caught.value.option == option
    assert caught.value.reason


@pytest.mark.parametrize("value", [None, "1", [1], {}, True, 1.5, object(), "x" * 500])
@pytest.mark.parametrize("option", [f.name for f in fields(Options)])
def test_no_type_passes_or_fails_unnamed(option: str, value: Any) -> None:
    """Either the value is one that the option takes, or the option's name is said."""
    made, error = tried(option, value)
    if error is not None:
        assert (error.option.split(".")[0], error.code) == (option, "option_refused")
        assert len(str(error)) < 250
    if made is not None:
        default, given = getattr(Options(), option), getattr(made, option)
        assert given is None or isinstance(given, float | int if isinstance(default, float) else type(default))
        json.dumps(made.as_dict())


def tried(option: str, value: Any) -> tuple[Options | None, OptionError | None]:
    try:
        return Options.from_dict({option: value}), None
    except OptionError as error:
        return None, error


@pytest.mark.parametrize("betas", [5, "ab", [0.9], [0.9, 0.99, 0.999], ["a", "b"], None])
def test_betas_are_a_pair(betas: Any) -> None:
    with pytest.raises(OptionError, match="betas"):
        Options.from_dict({"betas": betas})


def test_errors_survive_another_process() -> None:
    with pytest.raises(OptionError) as caught:
        Options(steps=0)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (str(again), again.option, again.code) == (str(caught.value), "steps", "option_refused")


def test_claas_at_alpha_zero_is_refused_and_at_one_is_the_sampled_branch() -> None:
    with pytest.raises(OptionError, match="identically zero"):
        claas(0.0)
    assert claas(1.0).support == "sampled"
    assert claas(1.0).top_k == 100


def test_presets_carry_no_known_collapse() -> None:
    assert set(PRESETS) == {
        "default", "claas", "claas_hosted", "lasgroup", "openclaw", "openclaw_combined", "sdft", "trl",
        "user_interactions_offline", "user_interactions_online",
    }  # fmt: skip
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
    assert (theirs.teacher, theirs.teacher_rate, theirs.teacher_mix) == ("ema", 0.05, 0.0)
    assert lasgroup(1.0).alpha == 1.0
    assert lasgroup(teacher="base", teacher_mix=0.05).teacher_mix == 0.05


def test_published_signals_are_choices_of_the_same_options() -> None:
    offline, online = PRESETS["user_interactions_offline"], PRESETS["user_interactions_online"]
    assert online.replace(policy_gradient=None, learning_rate=2e-6) == offline
    assert online.policy_gradient == PolicyGradient(centre=True, clip_low=0.2, clip_high=0.2)
    assert PRESETS["trl"].aggregation == PRESETS["sdft"].aggregation == "row-mean-token-mean"
    assert openclaw_combined(0.5, 2.0).policy_gradient == PolicyGradient(
        reference="behaviour", distill_weight=0.5, reward_weight=2.0, clip_low=0.2, clip_high=0.28
    )
    hosted = claas_hosted(0.7).policy_gradient
    assert hosted is not None
    assert (hosted.distill_weight, hosted.gain_target, hosted.max_gain) == (0.7, 0.03, 4.0)


def test_round_trip_and_unknown_names() -> None:
    options = Options(alpha=0.25, betas=(0.8, 0.95), is_clip=None)
    assert Options.from_dict(options.as_dict()) == options
    for preset in PRESETS.values():
        assert Options.from_dict(json.loads(json.dumps(preset.as_dict()))) == preset
    with pytest.raises(OptionError, match=r"policy_gradient\.centred"):
        Options.from_dict({"policy_gradient": {"centred": True}})
    with pytest.raises(OptionError, match="no such option") as caught:
        Options.from_dict({"learing_rate": 1e-3})
    assert caught.value.option == "learing_rate"


def test_changes_are_checked_again() -> None:
    with pytest.raises(OptionError):
        Options().replace(alpha=2.0)
    with pytest.raises(OptionError, match="no such option"):
        Options().replace(alfa=0.5)
    online = PRESETS["user_interactions_online"]
    assert online.replace(steps=2).policy_gradient == online.policy_gradient


def test_cautions_name_the_risk() -> None:
    assert any("teacher_mix" in c for c in Options(teacher_mix=1.0).cautions)
    assert any("teacher" in c for c in Options(teacher="live").cautions)
    assert any("teacher_rate" in c for c in Options(teacher="ema", teacher_rate=0.9).cautions)
    assert any("never moves" in c for c in Options(teacher="ema", teacher_rate=0.0).cautions)
    assert Options(teacher_rate=0.0).cautions == ()
    assert any("alpha" in c for c in Options(alpha=0.5).cautions)
    assert any("support" in c for c in Options(alpha=1.0, support="sampled", top_k=None).cautions)
