"""The script that measures on a GPU, tried in tiny on a CPU: a row for each way, and a failure costs its row alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
PEERS = ("PyHessian", "curvlinops", "hessian-eigenthings")  # rows of those that are absent say so

pytestmark = pytest.mark.slow


def rows_of(file: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCH / "bench_gpu.py"), *arguments, "--json", str(file), "--scale", "tiny"]
    subprocess.run([*command, "--device", "cpu", "--rounds", "1"], check=True, capture_output=True, timeout=300)
    return json.loads(file.read_text())["rows"]


def test_products_and_blocks_are_rows_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    rows = rows_of(file, "mlp", "nanogpt", "--no-compile")
    ours = [row for row in rows if row["by"].startswith("hessfn")]
    assert len(ours) == 2 * 3 and all(row["error"] < 1e-5 and row["gradients"] > 0 for row in ours), rows
    assert all("failed" not in row or row["by"].startswith(PEERS) for row in rows), rows
    first = next(row for row in rows if row["model"] == "mlp" and row["by"] == "gradient")
    again = rows_of(file, "mlp", "--blocks", "1,3")
    blocks = [row for row in again if row["what"] == "blocks" and "block" in row]
    assert [row["block"] for row in blocks] == [1, 3, 1, 3] and all(row["ms"] > 0 for row in blocks), again
    assert first in again and len(again) > len(rows), "what was there before is still there"


def test_a_job_has_its_numbers_and_their_true_errors(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "gpu.json", "--job", "gpt", "--products", "24")
    found = {row["number"]: row for row in rows if row["by"] == "hessfn"}
    truth = {row["number"]: row for row in rows if row["by"] == "truth"}
    assert set(found) == {"product", "top", "trace", "density"} and set(truth) == {"top", "trace", "density"}, rows
    assert found["top"]["off"] < 0.05 and 0 <= found["density"]["off"] < 0.05, found
    trace, true = found["trace"], truth["trace"]
    assert abs(trace["mean"] - true["mean"]) < 5 * (trace["stderr"] ** 2 + true["stderr"] ** 2) ** 0.5
    assert trace["off"] == pytest.approx(abs(trace["mean"] / true["mean"] - 1))


def test_what_does_not_fit_is_skipped_and_says_so(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "gpu.json", "mlp", "nanogpt", "--seconds", "0")
    assert [row["model"] for row in rows] == ["mlp", "nanogpt"]
    assert all(row["skipped"].startswith("0 s left") for row in rows)


def test_a_cell_that_hangs_is_stopped(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from argparse import Namespace; from pathlib import Path;"
        "from cells import Cells; cells = Cells(Namespace(seconds=9, cell=0.3, json=Path(sys.argv[2])));"
        "cells.run({'by': 'hangs'}, lambda: time.sleep(60) or {}, needs=0.1);"
        "cells.run({'by': 'fails'}, lambda: {}['x'], needs=0.1);"
        "cells.run({'by': 'works'}, lambda: {'ms': 1.0}, needs=0.1)"
    )
    file = tmp_path / "cells.json"
    subprocess.run([sys.executable, "-c", code, str(BENCH), str(file)], check=True, capture_output=True, timeout=60)
    hangs, fails, works = json.loads(file.read_text())["rows"]
    assert hangs["failed"].startswith("OutOfTime") and works["ms"] == 1.0
    assert fails["failed"].startswith("KeyError")
