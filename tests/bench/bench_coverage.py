"""How often 95 % intervals hold, as a table of Markdown: ``python tests/bench/bench_coverage.py``, in 15 minutes.

Names of estimators after it choose some of them: ``python tests/bench/bench_coverage.py xtrace xdiag``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import record
from coverage_cases import ESTIMATORS, KINDS, MATRICES, coverage

COUNTS = (5, 10, 30)
TRIALS = 4000  # one standard error of a share is a third of a percent


def row(estimator: str, kind: str, rows: list[dict[str, Any]]) -> str:
    """The least and the greatest share over the matrices, for every number of probes."""
    cells = []
    for num_probes in COUNTS:
        shares = [100 * coverage(estimator, matrix, kind, num_probes, TRIALS) for matrix in MATRICES]
        least, most = min(shares), max(shares)
        rows.append({"estimator": estimator, "kind": kind, "probes": num_probes, "least": least, "most": most})
        cells.append(f"{least:.1f} - {most:.1f}")
    return f"| {estimator} | {kind} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    record.add_option(parser)
    parser.add_argument("estimators", nargs="*", metavar="ESTIMATOR", help="default: all")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| | probes | " + " | ".join(str(count) for count in COUNTS) + " |")
    print("|---" * (2 + len(COUNTS)) + "|")
    for estimator in options.estimators or ESTIMATORS:
        for kind in KINDS.get(estimator, ("rademacher",)):
            print(row(estimator, kind, rows), flush=True)
    record.write(options.json, rows)
