"""The settings of the record: one factor at a time around the centre, under the names used in docs/experiments.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from benchmarks.learning.person import DEFAULTS, Method

CENTRE = Method(options=DEFAULTS.replace(learning_rate=7e-4, steps=8))
_OF_METHOD = frozenset(f.name for f in fields(Method)) - {"options"}


@dataclass(frozen=True)
class Setting:
    """What differs from the centre, under a name; which factor it belongs to, and on which plans it runs."""

    name: str
    group: str
    plans: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    feedback: str = "true"
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    every_order: bool = False
    """Sequences: all four orders with every seed, instead of one order per seed."""

    @property
    def method(self) -> Method:
        options = CENTRE.options.replace(**{k: v for k, v in self.changes.items() if k not in _OF_METHOD})
        return replace(CENTRE, options=options, **{k: v for k, v in self.changes.items() if k in _OF_METHOD})


def _single(group: str, name: str, **changes: Any) -> Setting:
    return Setting(name, group, ("single",), changes)


def _both(group: str, name: str, *plans: str, **changes: Any) -> Setting:
    """Around `rollouts both`, which is what holds in a sequence; the name says so."""
    return Setting(f"both, {name}", group, plans or ("sequence",), {"rollouts": "both"} | changes)


_SAMPLED: dict[str, Any] = {"alpha": 1.0, "support": "sampled", "top_k": None}

SETTINGS: tuple[Setting, ...] = (
    Setting("centre", "centre", ("single", "sequence")),
    Setting("rollouts both", "rollouts", ("single", "sequence"), {"rollouts": "both"}, every_order=True),
    Setting("both, change of mind", "flip", ("flip",), {"rollouts": "both"}),
    Setting("rollouts both, new seeds", "new seeds", ("sequence",), {"rollouts": "both"}, seeds=(4, 5, 6, 7)),
    Setting("contentless", "control", ("single",), feedback="contentless"),
    Setting("shuffled", "control", ("single",), feedback="shuffled"),
    Setting("A/A", "control", ("single",), seeds=(4, 5, 6, 7)),
    Setting("rollouts teacher", "rollouts", ("single", "sequence"), {"rollouts": "teacher"}, every_order=True),
    Setting("rollouts teacher, new seeds", "new seeds", ("sequence",), {"rollouts": "teacher"}, seeds=(4, 5, 6, 7)),
    _single("late", "3 late", late=3),
    _single("late", "3 late, refresh off", late=3, refresh=False),
    _single("late", "3 late, no ratio", late=3, is_clip=None),
    _single("late", "sampled", refresh=False, **_SAMPLED),
    _single("late", "3 late, sampled", late=3, refresh=False, **_SAMPLED),
    _single("late", "3 late, sampled, no ratio", late=3, refresh=False, is_clip=None, **_SAMPLED),
    _both("late", "3 late", "single", "sequence", late=3),
    _both("standing", "standing none", standing="none"),
    _both("standing", "standing all", standing="all"),
    _single("alpha", "alpha .1", alpha=0.1),
    _single("alpha", "alpha .5", alpha=0.5),
    _single("alpha", "alpha 1", alpha=1.0),
    _single("K", "K 1", top_k=1),
    _single("K", "K 20", top_k=20),
    _single("K", "alpha .5, K 100 renormalised", alpha=0.5, outside="renormalise"),
    _single("steps", "steps 1", steps=1),
    _single("steps", "steps 4", steps=4),
    _single("steps", "steps 4, refresh off", steps=4, refresh=False),
    _single("steps", "steps 4, no ratio", steps=4, is_clip=None),
    _single("steps", "steps 8, refresh off", refresh=False),
    _single("steps", "steps 8, no ratio", is_clip=None),
    _single("learning rate", "rate 3.5e-4", learning_rate=3.5e-4),
    _single("learning rate", "rate 1.4e-3", learning_rate=1.4e-3),
    _single("learning rate", "rate 2.8e-3", learning_rate=2.8e-3),
    _single("rank", "rank 2", rank=2),
    _single("rank", "rank 32", rank=32),
    Setting("teacher ema", "teacher", ("single", "sequence"), {"teacher": "ema", "teacher_rate": 0.05}),
    Setting("teacher previous", "teacher", ("single", "sequence"), {"teacher": "previous"}),
    Setting("teacher live", "teacher", ("single", "sequence"), {"teacher": "live"}),
    Setting("trust region .05", "teacher", ("single", "sequence"), {"teacher_mix": 0.05}),
    _single("anchor", "base KL .1", base_kl_weight=0.1),
    _single("anchor", "previous KL .1", previous_kl_weight=0.1),
    _single("rehearsal", "rehearsal 10 %", rehearsal=0.1),
    _both("anchor", "base KL .1", base_kl_weight=0.1),
    _both("anchor", "previous KL .1", previous_kl_weight=0.1),
    _both("rehearsal", "rehearsal 10 %", rehearsal=0.1),
    _both("rehearsal", "standing none, rehearsal 10 %", standing="none", rehearsal=0.1),
    _both("learning rate", "rate 1.4e-3", learning_rate=1.4e-3),
    _both("learning rate", "rate 3.5e-4", learning_rate=3.5e-4),
    _both("alpha", "alpha .5", alpha=0.5),
    _both("alpha", "alpha 1", alpha=1.0),
    _both("K", "K 20", top_k=20),
    _both("steps", "steps 4", steps=4),
    _both("rank", "rank 2", rank=2),
    _both("rank", "rank 32", rank=32),
)
