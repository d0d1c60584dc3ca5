"""docs/experiments.md, from the results alone: hand-written text from text.md; tables, figures and plots put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.learning import figures, plots, tables
from benchmarks.learning.plans import Record
from benchmarks.learning.settings import SETTINGS

TEXT = Path(__file__).with_name("text.md")


def names(plan: str) -> list[str]:
    return [s.name for s in SETTINGS if plan in s.plans]


def by_group(plan: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for s in SETTINGS:
        if plan in s.plans and s.name != "centre":
            groups.setdefault(s.group, []).append(s.name)
    return groups


def write(records: Sequence[Record], page: Path) -> None:
    """The page and its plots beside it. A setting without runs yet is left out of its table and named at the end."""
    plot_directory = page.with_suffix("")
    plots.curves(records, by_group("single"), plot_directory / "curves.svg")
    plots.differences(records, names("single"), plot_directory / "differences.svg")
    plots.traces(records, names("sequence"), plot_directory / "sequences.svg")
    parts = {
        "PROMPT": tables.markdown(tables.prompt_table(records)),
        "SINGLE": tables.markdown(tables.single_table(records, names("single"))),
        "SEQUENCE": tables.markdown(tables.sequence_summary(records, names("sequence"))),
        "ORACLE": tables.markdown(tables.oracle_table(records)),
        "SEQUENCE_RUNS": tables.markdown(tables.sequence_table(records, names("sequence"))),
        "FLIPS": tables.markdown(tables.flip_table(records)),
        "COUNTS": counts(records),
    }
    text = TEXT.read_text()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    page.write_text(figures.filled(text, records, names("single"), names("sequence")))


def counts(records: Sequence[Record]) -> str:
    """How many runs the page stands on, what they cost, and which settings have none or not all of theirs."""
    hours = sum(r["cpu_seconds"] for r in records) / 3600
    missing = [
        f"{s.name} ({plan})"
        for s in SETTINGS
        for plan in s.plans
        if not any(r["plan"] == plan and r["setting"] == s.name for r in records)
    ]
    text = f"{len(records)} runs, {hours:.1f} hours of one core."
    return f"{text} Not run yet: {', '.join(missing)}." if missing else f"{text} Every setting was run."
