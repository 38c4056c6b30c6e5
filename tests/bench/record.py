"""What a benchmark measured, as JSON: its rows, and what they depend on. All scripts here write the same form.

``benchmarks/results`` has the records that the README and docs/benchmarks.md are made of, by tools/readme_numbers.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hessfn.core.config import config

ROOT = Path(__file__).parents[2]
PEERS = {
    "PyHessian": "pyhessian",
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
}


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows there too, with what they depend on")


def write(file: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``{"benchmark", "command", "date", "commit", ..., "rows"}``; nothing where no file was asked for.

    A row is a flat dict: what was measured, by which library, and the numbers.
    """
    if file is None:
        return
    head = {
        "benchmark": Path(sys.argv[0]).stem.removeprefix("bench_"),
        "command": " ".join([f"tests/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "processor": config()["processor"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": versions(),
    }
    file.write_text(json.dumps({**head, "rows": list(rows)}, indent=1) + "\n", "utf-8")


def commit() -> str | None:
    """Of this checkout, with a plus where files have changed since; None outside of one."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    here = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return {name: here[package] for name, package in PEERS.items() if package in here}
