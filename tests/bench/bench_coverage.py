"""How often 95 % intervals hold, as a table of Markdown: ``python tests/bench/bench_coverage.py``, some minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import record
from coverage_cases import ESTIMATORS, MATRICES, coverage

COUNTS = (5, 10, 30)
TRIALS = 1000
SLOW = ("xtrace", "xdiag", "trace_of", "trace_of, eigenpairs")


def row(estimator: str, rows: list[dict[str, Any]]) -> str:
    """The least and the greatest share over the matrices, for every number of probes."""
    kind = "gaussian" if estimator.startswith(("xtrace", "trace_of")) else "rademacher"
    cells = []
    for num_probes in COUNTS:
        if num_probes == max(COUNTS) and estimator in SLOW:
            cells.append("")
            continue
        shares = [100 * coverage(estimator, matrix, kind, num_probes, TRIALS) for matrix in MATRICES]
        least, most = min(shares), max(shares)
        rows.append({"estimator": estimator, "kind": kind, "probes": num_probes, "least": least, "most": most})
        cells.append(f"{least:.1f} - {most:.1f}")
    return f"| {estimator} | {kind} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    record.add_option(parser)
    file, rows = parser.parse_args().json, []
    print("| | probes | " + " | ".join(str(count) for count in COUNTS) + " |")
    print("|---" * (2 + len(COUNTS)) + "|")
    for estimator in ESTIMATORS:
        print(row(estimator, rows), flush=True)
    record.write(file, rows)
