"""The figures in the text of docs/experiments.md: looked up in the runs, never written by hand.

{{single|SETTING|COLUMN}}, {{sequence|SETTING|COLUMN}}    a cell of the table
{{less|A|B|MEASURE}}     single: the mean of A less B over their common units, with its interval (a field of `Single`)
{{least|SETTING|MEASURE}}  single: the lowest of any run
{{reach|SETTING|SHARE}}  single: how many runs end at a compliance of SHARE or more, of how many
{{held|SETTING|OTHER}}   sequences: how many runs of SETTING hold, of those on units that OTHER has as well
{{ends|SETTING|PLACE}}   sequences: the best end of the 1st, 2nd or 3rd preference
{{versions|SETTING|N}}   sequences: the N-th lowest content, over the runs, of a version after a withdrawal
{{all held|SETTING;...}}   sequences: how many runs of these hold together, of how many, with the interval
{{worst withdrawn|SETTING,...}}   sequences: the most that any run of these still complies with what was withdrawn
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from benchmarks.learning.plans import Record
from benchmarks.learning.stats import estimate, exact, paired
from benchmarks.learning.tables import Rows, sequence_summary, sequences, share, shown, single_table, singles


def filled(text: str, records: Sequence[Record], single: Sequence[str], sequence: Sequence[str]) -> str:
    """The text with its figures; a name that is not there is a KeyError."""
    tables = {"single": single_table(records, single), "sequence": sequence_summary(records, sequence)}

    def figure(found: re.Match[str]) -> str:
        kind, *names = found[1].split("|")
        if kind in tables:
            return _cell(tables[kind], *names)
        return _KINDS[kind](records, *names)

    return re.sub(r"\{\{(.+?)\}\}", figure, text)


def _cell(rows: Rows, setting: str, column: str) -> str:
    head, *body = rows
    return {row[0]: row for row in body}[setting][head.index(column)].strip("*")


def _less(records: Sequence[Record], one: str, other: str, measure: str) -> str:
    values, reference = (
        {unit: float(getattr(run, measure)) for unit, run in singles(records, name).items()} for name in (one, other)
    )
    return shown(estimate(paired(values, reference))).strip("*")


def _least(records: Sequence[Record], setting: str, measure: str) -> str:
    return share(min(float(getattr(run, measure)) for run in singles(records, setting).values()))


def _reach(records: Sequence[Record], setting: str, least: str) -> str:
    ends = [run.end for run in singles(records, setting).values()]
    return f"{sum(end >= float(least) for end in ends)} of {len(ends)}"


def _held(records: Sequence[Record], setting: str, other: str) -> str:
    shared = sequences(records, other)
    return str(sum(run.holds for unit, run in sequences(records, setting).items() if unit in shared))


def _ends(records: Sequence[Record], setting: str, place: str) -> str:
    return share(max(run.ends[int(place) - 1] for run in sequences(records, setting).values()))


def _versions(records: Sequence[Record], setting: str, n: str) -> str:
    lowest = sorted(run.undone[3] for run in sequences(records, setting).values() if run.undone is not None)
    return share(lowest[int(n) - 1])


def _withdrawn(records: Sequence[Record], settings: str) -> str:
    runs = [run for name in settings.split(",") for run in sequences(records, name).values()]
    return share(max(run.undone[0] for run in runs if run.undone is not None))


def _all_held(records: Sequence[Record], settings: str) -> str:
    holds = [run.holds for name in settings.split(";") for run in sequences(records, name).values()]
    low, high = exact(sum(holds), len(holds))
    return f"{sum(holds)} of {len(holds)} ({share(low)} to {share(high)})"


_KINDS: dict[str, Callable[..., str]] = {
    "less": _less, "least": _least, "reach": _reach, "held": _held, "ends": _ends, "versions": _versions,
    "all held": _all_held,
    "worst withdrawn": _withdrawn,
}  # fmt: skip
