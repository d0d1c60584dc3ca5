"""The wire's training settings and the algorithm's options mean the same, and refuse the same."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from api_schemas.training import PresetName, ResolvedTraining, Rollouts, TrainingSettings, resolve
from sdpo_core.options import Options
from sdpo_core.presets import PRESETS
from sdpo_core.rollouts import learnt_from
from worker.errors import TrainingFailedError
from worker.mapping import options_of

SUPPORTS = {"teacher_topk": "teacher", "student_topk": "student", "full": "full", "sampled": "sampled"}
SHARED = ("outside", "is_clip", "steps", "refresh", "base_kl_weight", "learning_rate", "weight_decay", "max_grad_norm")


def test_every_preset_of_the_wire_is_one_of_the_library() -> None:
    """The library has more: presets for signals and rollouts that feedback jobs do not have."""
    assert set(get_args(PresetName)) == {"default", "claas", "lasgroup"}
    assert set(get_args(PresetName)) <= set(PRESETS)


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_every_preset_is_the_algorithms_own(preset: PresetName) -> None:
    wire, core = resolve(TrainingSettings(preset=preset)), PRESETS[preset]
    assert SUPPORTS[wire.support] == core.support
    assert (wire.alpha, wire.top_k) == (core.alpha, core.top_k)
    assert {n: getattr(wire, n) for n in SHARED} == {n: getattr(core, n) for n in SHARED}
    assert options_of(wire) == core.replace(measure_base_kl=True), "the service asks for the distance to the base"


def test_who_writes_the_answers_has_the_same_names_on_both_sides() -> None:
    """It is no option of a training step, and goes from the wire to `sdpo_core.learnt_from` as it is."""
    assert get_type_hints(ResolvedTraining)["rollouts"] == Rollouts == get_type_hints(learnt_from)["rollouts"]
    for chosen in get_args(Rollouts):
        assert resolve(TrainingSettings(rollouts=chosen)).rollouts == chosen
    with pytest.raises(ValidationError, match="rollouts"):
        TrainingSettings.model_validate({"rollouts": "sibling"})


@pytest.mark.parametrize("preset", ["claas", "lasgroup"])
def test_published_systems_learn_from_the_students_own_answers(preset: PresetName) -> None:
    assert resolve(TrainingSettings(rollouts="teacher"), TrainingSettings(preset=preset)).rollouts == "own"


def test_a_record_of_before_was_trained_on_the_students_own_answers() -> None:
    recorded = resolve(TrainingSettings()).model_dump(exclude={"rollouts"})
    assert ResolvedTraining(**recorded).rollouts == "own"


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_overrides_reach_the_algorithm(preset: PresetName) -> None:
    changes: dict[str, Any] = {
        "alpha": 0.75, "top_k": 7, "outside": "tail", "is_clip": 3.0, "steps": 9, "refresh": False,
        "base_kl_weight": 0.5, "learning_rate": 1e-6, "weight_decay": 0.25, "max_grad_norm": 2.0,
    }  # fmt: skip
    got = options_of(resolve(TrainingSettings(preset=preset, support="full", **changes)))
    assert got == PRESETS[preset].replace(support="full", measure_base_kl=True, **changes)


def accepted_by_wire(values: dict[str, Any]) -> ResolvedTraining | None:
    try:
        return resolve(TrainingSettings(**values))
    except ValidationError:
        return None


def accepted_by_core(values: dict[str, Any]) -> Options | None:
    """The algorithm asked directly, without the wire's own opinion."""
    unchecked = ResolvedTraining.model_construct(**(resolve(TrainingSettings()).model_dump() | values))
    try:
        return options_of(unchecked)
    except TrainingFailedError:
        return None


COMBINATIONS = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        "support": st.sampled_from(list(SUPPORTS)),
        "top_k": st.sampled_from([1, 2]) | st.integers(1, 4096),
        "outside": st.sampled_from(["tail", "renormalise"]),
    }
)


@given(values=COMBINATIONS)
@settings(max_examples=400, deadline=None)
def test_both_refuse_the_same_combinations(values: dict[str, Any]) -> None:
    assert (accepted_by_wire(values) is None) == (accepted_by_core(values) is None), values


def test_every_combination_of_limits() -> None:
    """All of them once, so that the test above does not depend on luck."""
    refused = 0
    for alpha in (0.0, 0.5, 1.0):
        for support in SUPPORTS:
            for top_k in (1, 2, 100):
                for outside in ("tail", "renormalise"):
                    values = {"alpha": alpha, "support": support, "top_k": top_k, "outside": outside}
                    wire, core = accepted_by_wire(values), accepted_by_core(values)
                    assert (wire is None) == (core is None), values
                    refused += wire is None
    # sampled below alpha 1: 12; teacher, renormalised: 3 with top_k 1 and 2 with alpha 0; student: 6 and 2 likewise
    assert refused == 25


BOUNDS = {
    "is_clip": (1.0, 100.0),
    "base_kl_weight": (0.0, 10.0),
    "learning_rate": (1e-9, 0.1),
    "weight_decay": (0.0, 1.0),
    "max_grad_norm": (1e-6, 1000.0),
    "steps": (1, 64),
    "top_k": (1, 4096),
}


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_whatever_the_wire_lets_in_the_algorithm_takes(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        resolved = resolve(TrainingSettings.model_validate({name: value}))
        assert getattr(options_of(resolved), name) == value
    below = low - 1 if isinstance(low, int) or low >= 1 else low / 2 if low else -1e-6
    above = high + 1 if isinstance(high, int) else high * 1.01
    for value in (below, above):
        with pytest.raises(ValidationError, match=name):
            TrainingSettings.model_validate({name: value})
