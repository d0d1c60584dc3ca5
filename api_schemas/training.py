"""Training settings: presets, per-adapter defaults and per-batch overrides, resolved and checked in one place.

The numbers mean what they mean in sdpo_core (docs/algorithm.md); a test holds the two to each other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from api_schemas.base import Request

PresetName = Literal["default", "claas", "lasgroup"]
PathName = Literal["auto", "plain"]
Rollouts = Literal["own", "teacher", "both"]


class TrainingSettings(Request):
    """Overrides: what is None comes from the adapter's settings, then from the preset."""

    preset: PresetName | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the teacher in the mixture; 0 = forward KL, 1 = reverse KL."""
    support: Literal["teacher_topk", "student_topk", "full", "sampled"] | None = None
    top_k: Annotated[int, Field(ge=1, le=4096)] | None = None
    outside: Literal["tail", "renormalise"] | None = None
    is_clip: Annotated[float, Field(ge=1, le=100)] | None = None
    """Upper clip of the importance ratio."""
    steps: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most optimizer steps on this batch; training ends earlier once the gap to the teacher is closed."""
    refresh: bool | None = None
    """Recompute behaviour log-probs between steps."""
    base_kl_weight: Annotated[float, Field(ge=0, le=10)] | None = None
    rollouts: Rollouts | None = None
    """Whose answers are learnt from: those that the remarks are on, what the base model writes to the same prompts when
    it is told the remarks, or both. An answer of the latter kind that does not reach its end is left out."""
    learning_rate: Annotated[float, Field(ge=1e-9, le=0.1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1000)] | None = None
    measure_base_kl: bool | None = None
    """Report the distance to the base, at the price of one forward pass of the base for each batch (default)."""
    path: PathName | None = None
    """How a step is computed, never what: `plain`, or the fast path wherever it can be taken (`auto`, the default)."""
    audit: bool | None = None
    """Run both paths on every micro-batch and report their differences. More than doubles the work."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class ResolvedTraining(Request):
    """Every value filled in: what a job is trained with, and what its version records."""

    preset: PresetName = "default"
    alpha: float
    support: Literal["teacher_topk", "student_topk", "full", "sampled"]
    top_k: int
    outside: Literal["tail", "renormalise"]
    is_clip: float
    steps: int
    refresh: bool
    base_kl_weight: float
    rollouts: Rollouts = "own"
    """What a record without it was trained with."""
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    measure_base_kl: bool = True
    path: PathName = "auto"
    audit: bool = False
    seed: int | None = None

    @model_validator(mode="after")
    def _trains_something(self) -> ResolvedTraining:
        if refusal := refusal_of(self):
            raise ValueError(refusal)
        return self


def refusal_of(s: ResolvedTraining) -> str | None:
    """Why this combination is refused, or None. Each of these trains nothing or is known to collapse."""
    if s.support == "sampled":
        if s.alpha != 1.0:
            return "support 'sampled' estimates the reverse KL only: set alpha to 1"
        return None
    if s.support == "full":
        return None
    if s.outside == "renormalise" and s.top_k == 1:
        return "top_k 1 renormalised is identically zero: set outside to 'tail' or raise top_k"
    if s.outside == "renormalise" and s.support == "teacher_topk" and s.alpha == 0.0:
        return "alpha 0 renormalised over the teacher's top-k does not hold the student back: set outside to 'tail'"
    if s.support == "student_topk" and s.alpha == 0.0:
        return "alpha 0 on the student's own top-k collapses to empty answers: use support 'teacher_topk'"
    return None


_DEFAULT: dict[str, Any] = {
    "alpha": 0.0, "support": "teacher_topk", "top_k": 100, "outside": "tail", "is_clip": 2.0, "steps": 8,
    "refresh": True, "base_kl_weight": 0.0, "rollouts": "both", "learning_rate": 1e-4, "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}  # fmt: skip
_CLAAS = _DEFAULT | {
    "alpha": 0.5, "outside": "renormalise", "is_clip": 5.0, "steps": 1, "rollouts": "own", "learning_rate": 3e-5,
    "weight_decay": 0.01,
}  # fmt: skip
_LASGROUP = _DEFAULT | {
    "alpha": 0.5, "support": "student_topk", "steps": 1, "rollouts": "own", "learning_rate": 1e-5, "weight_decay": 0.01,
}  # fmt: skip


def preset_values(name: PresetName) -> dict[str, Any]:
    """A fresh copy of a preset's values, by field name."""
    return dict({"default": _DEFAULT, "claas": _CLAAS, "lasgroup": _LASGROUP}[name])


def resolve(adapter: TrainingSettings, batch: TrainingSettings | None = None) -> ResolvedTraining:
    """Preset, then the adapter's settings, then the batch's: the later one counts.

    A batch that names a preset of its own starts from that preset and leaves the adapter's other settings out.
    Raises pydantic.ValidationError for a combination that trains nothing.
    """
    overrides = batch.model_dump(exclude_none=True) if batch else {}
    if "preset" not in overrides:
        overrides = adapter.model_dump(exclude_none=True) | overrides
    preset: PresetName = overrides.pop("preset", "default")
    return ResolvedTraining(preset=preset, **(preset_values(preset) | overrides))


ModuleName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]


class LoraSettings(Request):
    """The adapter's shape, fixed at creation."""

    rank: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Annotated[int, Field(ge=1, le=1024)] = 32
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=32)] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    @model_validator(mode="after")
    def _named_once(self) -> LoraSettings:
        if len(set(self.target_modules)) != len(self.target_modules):
            raise ValueError("target_modules names a module twice")
        return self
