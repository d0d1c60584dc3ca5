"""What docs/experiments.md says in words, held against the runs. Its figures are looked up when the page is written."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.learning.plans import STUDIED, Record
from benchmarks.learning.report import TEXT
from benchmarks.learning.run import grid, read
from benchmarks.learning.settings import SETTINGS
from benchmarks.learning.stats import estimate, paired
from benchmarks.learning.tables import Sequenced, Single, flips, sequences, singles

RESULTS = Path(__file__).parents[2] / "docs" / "experiments" / "results.jsonl"
TIE = "no difference seen"


@pytest.fixture(scope="module")
def record() -> Runs:
    return Runs(read(RESULTS))


class Runs:
    """The record, asked in the page's words."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.told = {(r["told"], r["unit"]): r for r in records if r["plan"] == "in prompt"}

    def single(self, setting: str) -> list[Single]:
        return list(singles(self.records, setting).values())

    def of(self, setting: str, key: str) -> list[Single]:
        return [run for (unit, _), run in singles(self.records, setting).items() if unit == key]

    def row(self, setting: str) -> list[Sequenced]:
        """Sequences, in the order of their units."""
        return [run for _, run in sorted(sequences(self.records, setting).items())]

    def holds(self, setting: str) -> list[bool]:
        return [run.holds for run in self.row(setting)]

    def verdict(self, one: str, measure: str = "speed", other: str = "centre") -> str:
        values, reference = (
            {u: float(getattr(r, measure)) for u, r in singles(self.records, s).items()} for s in (one, other)
        )
        return estimate(paired(values, reference)).of_zero

    def oracles_beat_content_alone(self) -> bool:
        """Against the adapters: their compliance within .03 on average, their content lower by .05 or more."""
        told = [r for r in self.records if r["plan"] == "oracle"]
        rows = [run for s in sorted({r["setting"] for r in told}) for run in self.row(s)]
        complies = statistics.fmean(statistics.fmean(r["complies"].values()) for r in told)
        reached = statistics.fmean(statistics.fmean(run.ends) for run in rows)
        content = statistics.fmean(r["content"] for r in told)
        return abs(complies - reached) < 0.03 and statistics.fmean(run.content for run in rows) < content - 0.05

    def mean(self, setting: str, measure: str, key: str | None = None) -> float:
        runs = self.single(setting) if key is None else self.of(setting, key)
        return statistics.fmean(getattr(run, measure) for run in runs)

    def product(self, setting: str, key: str) -> float:
        """Compliance times content at the end, mean over seeds."""
        return statistics.fmean(run.end * run.content for run in self.of(setting, key))


ALPHAS = ("alpha .1", "alpha .5", "alpha 1")
JUDGED = [s.name for s in SETTINGS if "sequence" in s.plans and s.method.standing == "judged"]
Claim = Callable[[Runs], bool]
CLAIMS: dict[str, Claim] = {
    "with one remark it gains 1.00 in compliance and loses no content": lambda r: all(
        r.told[1, k]["complies"][k] - r.told[0, k]["complies"][k] >= 0.995 and r.told[1, k]["content"] >= 0.995
        for k in STUDIED
    ),
    "The memory works with 4 remarks and destroys this model's answers with 16 and 32": lambda r: all(
        r.told[4, k]["content"] >= 0.98 and r.told[32, k]["content"] < 0.25 for k in STUDIED
    ),
    "a trained adapter at 32 remarks beats it on every preference": lambda r: all(
        r.product("centre", k) > r.told[32, k]["content"] * r.told[32, k]["complies"][k] for k in STUDIED
    ),
    "No gain, though": lambda r: max(value for run in r.single("shuffled") for _, value in run.curve) <= 0.03,
    "the four units of a seed hear the same": lambda r: (
        len({(u[1], run) for u, run in singles(r.records, "contentless").items()}) == 4
        and not any(run.updates for run in r.single("contentless"))
    ),
    "with a stop that means the same for each, all arrive": lambda r: all(r.mean(a, "end") >= 0.95 for a in ALPHAS),
    "a little slower at the start": lambda r: [r.verdict(a) for a in ALPHAS] == [TIE, "less", TIE],
    "Content: no difference seen for any": lambda r: all(r.verdict(a, "content") == TIE for a in ALPHAS),
    "1, 20, 100 with a tail: no difference seen": lambda r: all(
        r.verdict(k, m) == TIE for k in ("K 1", "K 20") for m in ("speed", "content")
    ),
    "renormalised at alpha .5 is like the tail at alpha .5": lambda r: (
        r.verdict("alpha .5, K 100 renormalised", "speed", "alpha .5") == TIE
    ),
    "One step per batch learns nothing within 32 remarks, 4 are much slower than 8": lambda r: (
        r.mean("steps 1", "end") == 0.0 and r.verdict("steps 4") == "less"
    ),
    "every preference is learnt and kept, and words are lost": lambda r: (
        all(min(run.ends) >= 0.9 for run in r.row("both, steps 4"))
        and sum(r.holds("both, steps 4")) < sum(same_units(r, "both, steps 4"))
    ),
    "as many as K 100 on the same units": lambda r: sum(r.holds("both, K 20")) == sum(same_units(r, "both, K 20")),
    "and not as far as the centre": lambda r: all(
        max(r.mean(s, m) for s in ("3 late, sampled", "3 late, sampled, no ratio"))
        < r.mean("sampled", m)
        < r.mean("centre", m)
        for m in ("end", "content")
    ),
    "in every run the first preference is gone at the end, and no remark for it stands": lambda r: all(
        run.old <= 0.1 and run.old_stands == 0 for run in flips(r.records).values()
    ),
    "the second is learnt after the first as well": lambda r: all(run.end >= 0.9 for run in flips(r.records).values()),
    "With 4 steps, refresh and the ratio make no difference": lambda r: all(
        r.verdict(f"steps 4, {off}", m, "steps 4") == TIE
        for off in ("refresh off", "no ratio")
        for m in ("speed", "end", "content")
    ),
    "nor do they with 8": lambda r: all(
        r.verdict(f"steps 8, {off}", m) == TIE
        for off in ("refresh off", "no ratio")
        for m in ("speed", "end", "content")
    ),
    "twice and four times the rate are faster": lambda r: all(
        r.verdict(f"rate {x}") == "more" for x in ("1.4e-3", "2.8e-3")
    ),
    "and all dip deeper on the way": lambda r: all(
        min(x.lowest_content for x in r.single(s)) < min(x.lowest_content for x in r.single("centre"))
        for s in ("rate 1.4e-3", "rate 2.8e-3", "rank 32")
    ),
    "Half the rate and rank 2 are slower. Content at the end: no difference seen.": lambda r: all(
        r.verdict(s) == "less" and r.verdict(s, "content") == TIE for s in ("rate 3.5e-4", "rank 2")
    ),
    '"hope" and "upper" are as good as on time': lambda r: all(
        abs(r.mean("3 late", m, k) - r.mean("centre", m, k)) < 0.02
        for m in ("end", "content")
        for k in ("hope", "upper")
    ),
    'all of it on "bullets" and "vera"': lambda r: all(
        r.mean("3 late", "content", k) < r.mean("centre", "content", k) - 0.1 for k in ("bullets", "vera")
    ),
    "**The ratio does not repair this**": lambda r: all(
        r.verdict("3 late", m, "3 late, no ratio") == TIE for m in ("end", "content")
    ),
    "worse by its means, no difference seen": lambda r: all(
        r.mean("3 late, refresh off", m) < r.mean("3 late", m) and r.verdict("3 late, refresh off", m, "3 late") == TIE
        for m in ("end", "content")
    ),
    "fails late with it and without it": lambda r: all(
        r.mean(s, "content") < 0.5 for s in ("3 late, sampled", "3 late, sampled, no ratio")
    ),
    "both as on time": lambda r: all(r.verdict("both, 3 late", m, "rollouts both") == TIE for m in ("end", "content")),
    "on one preference the moving average is the frozen base to two digits": lambda r: all(
        abs(r.mean("teacher ema", m) - r.mean("centre", m)) < 0.005 for m in ("end", "speed", "content")
    ),
    "student, teacher, both: no difference seen on one preference": lambda r: all(
        r.verdict(s, m) == TIE for s in ("rollouts both", "rollouts teacher") for m in ("speed", "end", "content")
    ),
    "A teacher told only the newest remark erases every earlier preference": lambda r: all(
        max(run.ends[:2]) < 0.1 <= run.ends[2] for run in r.row("both, standing none")
    ),
    "Judged, one remark per preference stood in every run": lambda r: all(
        run.stands == 3 for s in JUDGED for run in r.row(s)
    ),
    "**A teacher that follows the student collapses**": lambda r: (
        not any(r.holds("teacher previous") + r.holds("teacher live"))
    ),
    "as many runs hold as with the frozen base, with the same dips in the same runs": lambda r: (
        r.holds("teacher ema") == r.holds("trust region .05") == r.holds("centre")
    ),
    "**Anchors on the new prompts do not help**": lambda r: (
        not any(r.holds("both, base KL .1")) and sum(r.holds("both, previous KL .1")) < 4
    ),
    "the best rate for one preference is not the best for three": lambda r: (
        sum(r.holds("both, rate 1.4e-3")) < sum(same_units(r, "both, rate 1.4e-3"))
    ),
    "in one order the third preference was not learnt at all, and in two the withdrawn one stayed": lambda r: (
        sum(run.ends[2] < 0.1 for run in r.row("both, alpha .5")) == 1
        and sum(run.undone is not None and run.undone[0] > 0.9 for run in r.row("both, alpha .5")) == 2
    ),
    "do worse in a row": lambda r: all(
        sum(r.holds(s)) < sum(same_units(r, s)) for s in ("both, alpha .5", "both, alpha 1")
    ),
    "in one order learnt nothing rightly": lambda r: (
        [max(run.ends) < 0.6 and run.content < 0.5 for run in r.row("both, alpha 1")].count(True) == 1
    ),
    "makes no difference that is seen": lambda r: all(
        r.verdict(s) == TIE for s in ("previous KL .1", "rehearsal 10 %")
    ),
    "(the two others at content .83 and .84;": lambda r: (
        sorted(round(run.content, 2) for run in r.row("rollouts both") if not run.holds) == [0.83, 0.84]
    ),
    "content falls in the middle of a lesson, to as little as .06": lambda r: (
        round(min(run.lowest_content for run in r.row("centre")), 2) == 0.06
    ),
    "Every preference is learnt and kept in all of them": lambda r: all(
        min(run.ends) >= 0.9 for s in ("teacher", "both") for run in r.row(f"rollouts {s}, new seeds")
    ),
    "compliance is matched, content is not": lambda r: r.oracles_beat_content_alone(),
    "alpha .5 and 1, and a teacher that follows the student, leave more of it": lambda r: all(
        max(run.undone[0] for run in r.row(s) if run.undone is not None) > 0.1
        for s in ("both, alpha .5", "both, alpha 1", "teacher previous")
    ),
    "or less and the others stay at .88 or more": lambda r: all(
        run.undone is not None and run.undone[1] >= 0.88
        for s in ("centre", "rollouts both", "rollouts teacher")
        for run in r.row(s)
    ),
}


def same_units(runs: Runs, setting: str) -> list[bool]:
    """Whether `rollouts both` holds on the units that the setting has."""
    units = sequences(runs.records, setting)
    return [run.holds for unit, run in sequences(runs.records, "rollouts both").items() if unit in units]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_of_the_page_is_what_the_runs_say(record: Runs, claim: str) -> None:
    assert claim in " ".join(TEXT.read_text().split()), "the page says it in other words: change both"
    assert CLAIMS[claim](record), "the runs do not say so"


def test_the_record_is_whole() -> None:
    """Every setting, four preferences or orders, four seeds at least; what its name says of the answers is what ran."""
    records = read(RESULTS)
    there = {tuple(r[k] for k in ("plan", "setting", "unit", "seed")) for r in records}
    wanted = {tuple(run.name.values()) for run in grid(records=records)}
    assert there == wanted
    for setting in SETTINGS:
        assert len(setting.seeds) >= 4
        written = next((w for w in ("both", "teacher") if setting.name.split(",")[0] == f"rollouts {w}"), None)
        assert setting.method.rollouts == (written or ("both" if setting.name.startswith("both, ") else "own"))
