"""Run what is missing of the experiment record, then write the page.

python -m benchmarks.learning                    everything (`make experiments`)
python -m benchmarks.learning --only alpha       one group or setting
python -m benchmarks.learning --only report      the page alone, from the results there are
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.learning.report import write
from benchmarks.learning.run import grid, read, run_missing
from benchmarks.learning.settings import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"
RESULTS = PAGE.with_suffix("") / "results.jsonl"


def main() -> None:
    choices = sorted({s.name for s in SETTINGS} | {s.group for s in SETTINGS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help=f"report, or: {', '.join(choices).replace('%', '%%')}",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines, one per finished run")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if unknown := set(args.only) - {*choices, "report"}:
        parser.error(f"there is no setting or group {sorted(unknown)[0]!r}")
    torch.set_num_threads(1)
    if args.only != ["report"]:
        run_missing(args.results, grid(args.only, read(args.results)), lambda line: print(line, flush=True))
    write(read(args.results), args.page)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
