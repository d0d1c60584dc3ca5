"""Model check of lease, commit and publish: every interleaving within bounds, over the store's own functions.

    python -m tests.durability.model --states 1000000

Breadth first, so a violation is shown by a shortest way to it. `states` are distinct states of the whole system,
`calls` the distinct transactions that were really run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.durability.model.explore import explore
from tests.durability.model.system import Bounds

REPORT = Path("build/reports/model.json")


def main() -> int:
    parser = argparse.ArgumentParser(description="Every interleaving of lease, commit and publish.")
    parser.add_argument("--states", type=int, default=1_000_000, help="stop after so many")
    for name, default in vars(Bounds()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    most, began = arguments.pop("states"), time.process_time()
    report = explore(Bounds(**arguments), most) | {"cpu_seconds": round(time.process_time() - began, 1)}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 1 if report["violation"] else 0


if __name__ == "__main__":
    sys.exit(main())
