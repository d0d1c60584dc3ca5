"""The kill matrix: any part killed or frozen at any point of a job's path, on SQLite and on PostgreSQL.

    python -m tests.durability.kill --runs 200 --seed 1

Each run sends feedback, lets one fault strike at a named point, starts again what died, and waits until everything is
learnt and served. Many runs share one stack, so versions grow on top of each other. Exit status 1 if anything was lost,
applied twice, out of order or broken.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tests.durability.kill.matrix import check
from tests.durability.kill.report import summary

REPORT = Path("build/reports/kill.json")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and freeze every part at every point.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    report = summary(check(arguments.runs, arguments.seed, arguments.databases), arguments.seed)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if report["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
