"""Runs as numbers: what each record says per unit, and the tables made of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.learning.plans import CURVE, STUDIED, Record
from benchmarks.learning.stats import Estimate, Unit, estimate, exact, items_to, paired

ITEMS = tuple(sum(CURVE[: n + 1]) for n in range(len(CURVE)))
Rows = list[list[str]]


@dataclass(frozen=True)
class Single:
    """One run of one preference."""

    curve: tuple[tuple[int, float], ...]
    """(remarks, compliance)"""
    content: float
    lowest_content: float
    base_kl: float
    updates: int

    @property
    def end(self) -> float:
        return self.curve[-1][1]

    @property
    def speed(self) -> float:
        """Mean compliance over the points of the curve."""
        return statistics.fmean(value for _, value in self.curve)


def singles(records: Iterable[Record], setting: str) -> dict[Unit, Single]:
    found = {}
    for r in records:
        if r["plan"] == "single" and r["setting"] == setting:
            contents = [p["content"] for p in r["curve"]]
            found[r["unit"], r["seed"]] = Single(
                tuple((p["items"], p["complies"][r["unit"]]) for p in r["curve"]),
                contents[-1], min(contents), r["curve"][-1]["base_kl"], r["updates"],
            )  # fmt: skip
    return found


def single_table(records: Sequence[Record], settings: Sequence[str], centre: str = "centre") -> Rows:
    """A row per setting: the curve, its end, and the paired differences to the centre."""
    reference = singles(records, centre)
    rows = [["setting", "runs", *(f"{n}" for n in ITEMS), "to 90 %", "content", "lowest", "KL", "updates",
             "curve less the centre's", "content less the centre's"]]  # fmt: skip
    for setting in settings:
        if not (runs := singles(records, setting)):
            continue
        rows.append(
            [
                setting,
                f"{len(runs)}",
                *(share(statistics.fmean(dict(r.curve)[n] for r in runs.values())) for n in ITEMS),
                reached([items_to(0.9, r.curve) for r in runs.values()]),
                share(mean(runs, lambda r: r.content)),
                share(min(r.lowest_content for r in runs.values())),
                f"{mean(runs, lambda r: r.base_kl):.2f}",
                f"{mean(runs, lambda r: r.updates):.0f}",
                *(difference(runs, reference, what) for what in (lambda r: r.speed, lambda r: r.content)),
            ]
        )
    return rows


def mean(runs: dict[Unit, Any], what: Callable[[Any], float]) -> float:
    return statistics.fmean(what(r) for r in runs.values())


def difference(runs: dict[Unit, Any], reference: dict[Unit, Any], what: Callable[[Any], float]) -> str:
    """The paired difference with its interval, bold where the interval leaves 0 out."""
    if runs == reference:
        return ""
    pairs = paired({u: what(r) for u, r in runs.items()}, {u: what(r) for u, r in reference.items()})
    return shown(estimate(pairs))


def shown(e: Estimate) -> str:
    text = f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"
    return text if e.of_zero == "no difference seen" else f"**{text}**"


def reached(items: Sequence[float]) -> str:
    """Median of the runs, and how many never got there."""
    never = sum(math.isinf(n) for n in items)
    median = statistics.median_high(items)
    text = "never" if math.isinf(median) else f"{median:.0f}"
    return text if never in (0, len(items)) else f"{text} ({never} never)"


def share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.2f}"


@dataclass(frozen=True)
class Sequenced:
    """One run of three preferences in a row, and the withdrawal of the second."""

    ends: tuple[float, ...]
    """Compliance with each preference at the end."""
    content: float
    lowest_content: float
    forgotten: float
    """The most that a preference lost between its own lesson and the end."""
    base_kl: float
    stands: int
    withdrawn: tuple[Record, ...]
    keys: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Each preference at .9 or more, and the words right in .85."""
        return min(self.ends) >= 0.9 and self.content >= 0.85

    @property
    def undone(self) -> tuple[float, float, float, float] | None:
        """After the withdrawal: the second's compliance, the worse of the others, content, lowest content."""
        if not self.withdrawn:
            return None
        last = self.withdrawn[-1]
        others = min(last["complies"][k] for k in (self.keys[0], self.keys[2]))
        lowest = min(p["content"] for p in self.withdrawn)
        return last["complies"][self.keys[1]], others, last["content"], lowest


def sequences(records: Iterable[Record], setting: str) -> dict[Unit, Sequenced]:
    found = {}
    for r in records:
        if r["plan"] == "sequence" and r["setting"] == setting:
            keys, matrix = tuple(r["keys"]), r["matrix"]
            ends = tuple(matrix[-1]["complies"][k] for k in keys)
            learnt = [matrix[n]["complies"][k] for n, k in enumerate(keys)]
            found[r["unit"], r["seed"]] = Sequenced(
                ends, matrix[-1]["content"], min(p["content"] for p in r["trace"]),
                max(a - b for a, b in zip(learnt[:-1], ends[:-1], strict=True)), matrix[-1]["base_kl"],
                len(r["standing"]), tuple(r["withdrawn"]), keys,
            )  # fmt: skip
    return found


def sequence_table(records: Sequence[Record], settings: Sequence[str]) -> Rows:
    """A row per run."""
    rows = [["setting", "order", "seed", "first", "second", "third", "content", "lowest", "forgotten", "KL", "stand",
             "holds", "withdrawn", "others", "content", "lowest"]]  # fmt: skip
    for setting in settings:
        for (order, seed), r in sorted(sequences(records, setting).items(), key=lambda item: (item[0][1], item[0][0])):
            undone = ["-"] * 4 if r.undone is None else [share(v) for v in r.undone]
            rows.append(
                [setting, order.replace(">", ", "), f"{seed}", *(share(v) for v in r.ends), share(r.content),
                 share(r.lowest_content), f"{r.forgotten:+.2f}", f"{r.base_kl:.2f}", f"{r.stands}",
                 "yes" if r.holds else "**no**", *undone]
            )  # fmt: skip
    return rows


def sequence_summary(records: Sequence[Record], settings: Sequence[str]) -> Rows:
    """A row per setting: how many runs hold, and the worst of each figure."""
    rows = [["setting", "runs", "hold", "95 %", "mean of the ends", "worst end", "mean content", "worst content",
             "worst forgotten", "mean KL", "withdrawn, worst", "content then, worst version"]]  # fmt: skip
    for setting in settings:
        if not (runs := sequences(records, setting)):
            continue
        undone = [r.undone for r in runs.values() if r.undone is not None]
        rows.append(
            [
                setting,
                f"{len(runs)}",
                f"{(held := sum(r.holds for r in runs.values()))}",
                " to ".join(share(p) for p in exact(held, len(runs))),
                share(mean(runs, lambda r: statistics.fmean(r.ends))),
                share(min(min(r.ends) for r in runs.values())),
                share(mean(runs, lambda r: r.content)),
                share(min(r.content for r in runs.values())),
                f"{max(r.forgotten for r in runs.values()):+.2f}",
                f"{mean(runs, lambda r: r.base_kl):.2f}",
                share(max(u[0] for u in undone)) if undone else "-",
                share(min(u[3] for u in undone)) if undone else "-",
            ]
        )
    return rows


@dataclass(frozen=True)
class Flipped:
    """One change of mind. `alone` and `after`: remarks to 90 % compliance with the rival, for good; inf: never."""

    alone: float
    after: float
    end: float
    """Compliance with the rival at the end."""
    old: float
    """With the preference before it."""
    content: float
    old_stands: int
    """Remarks for the preference before it that still stand."""


def flips(records: Iterable[Record]) -> dict[Unit, Flipped]:
    found = {}
    for r in records:
        if r["plan"] == "flip":
            key, rival = r["unit"].split(">")
            alone, after = (
                items_to(0.9, [(p["items"], p["complies"][rival]) for p in r[part]]) for part in ("alone", "after")
            )
            last = r["after"][-1]
            found[r["unit"], r["seed"]] = Flipped(
                alone, after, last["complies"][rival], last["complies"][key], last["content"], r["stood"][0]
            )
    return found


def flip_table(records: Iterable[Record]) -> Rows:
    """A row per change of mind: remarks to 90 % alone and after the other, run by run, and the ends."""
    runs = flips(records)
    rows = [["first, then", "runs", "to 90 % alone", "to 90 % after", "end, lowest", "first at the end, highest",
             "mean content", "lowest content", "first still stands"]]  # fmt: skip
    for unit in sorted({unit for unit, _ in runs}):
        mine = [run for (of, _), run in sorted(runs.items()) if of == unit]
        rows.append(
            [
                unit.replace(">", ", "),
                f"{len(mine)}",
                *(", ".join(_items(getattr(r, what)) for r in mine) for what in ("alone", "after")),
                share(min(r.end for r in mine)),
                share(max(r.old for r in mine)),
                share(statistics.fmean(r.content for r in mine)),
                share(min(r.content for r in mine)),
                f"{sum(r.old_stands > 0 for r in mine)} of {len(mine)}",
            ]
        )
    return rows


def _items(n: float) -> str:
    return "never" if math.isinf(n) else f"{n:.0f}"


def oracle_table(records: Iterable[Record]) -> Rows:
    """The untrained model told what stood at the end of each sequence of a setting: the lowest of any run."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r["plan"] == "oracle":
            found.setdefault(r["setting"], []).append(r)
    rows = [["told what stood after", "runs", "lowest compliance", "mean content", "lowest content"]]
    for setting, runs in sorted(found.items()):
        lowest = min(value for r in runs for value in r["complies"].values())
        contents = [r["content"] for r in runs]
        rows.append([setting, f"{len(runs)}", share(lowest), share(statistics.fmean(contents)), share(min(contents))])
    return rows


def prompt_table(records: Iterable[Record]) -> Rows:
    """The untrained model with remarks in its prompt: compliance and content per preference."""
    cells = {(r["told"], r["unit"]): r for r in records if r["plan"] == "in prompt"}
    rows = [["remarks in the prompt", *STUDIED]]
    for told in sorted({told for told, _ in cells}):
        found = [cells[told, key] for key in STUDIED]
        rows.append([f"{told}", *(f"{share(r['complies'][r['unit']])} / {share(r['content'])}" for r in found)])
    return rows


def markdown(rows: Rows) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
