"""The tables of README.md and docs/benchmarks.md are made of the records in benchmarks/results, and hold."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tools_of import tool

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FEATURES = json.loads((ROOT / "benchmarks" / "results" / "features.json").read_text("utf-8"))["rows"]
TRIED = [row for row in FEATURES if row["has"] or "Error" in row["why"]]  # of the others there is nothing to call


@pytest.fixture(scope="module")
def numbers() -> ModuleType:
    return tool("readme_numbers")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The scripts of tests/bench, which are no package."""
    folder = str(ROOT / "tests" / "bench")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


def test_tables_are_those_that_the_script_makes(numbers: ModuleType) -> None:
    found = {page.name: numbers.TABLE.findall(page.read_text("utf-8")) for page in numbers.PAGES}
    assert {name for tables in found.values() for _, name, _ in tables} == set(numbers.TABLES)
    for page in numbers.PAGES:
        assert numbers.filled(page.read_text("utf-8")) == page.read_text("utf-8"), "python tools/readme_numbers.py"


@pytest.mark.parametrize("name", [path.stem for path in RECORDS])
def test_every_number_of_a_record_that_is_shown_comes_from_it(
    name: str, numbers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another date is another page: no table is typed, and no record is idle."""
    pages = {page: page.read_text("utf-8") for page in numbers.PAGES}
    results = tmp_path / "results"
    shutil.copytree(numbers.RESULTS, results)
    changed = {**json.loads((results / f"{name}.json").read_text("utf-8")), "date": "1999-12-31"}
    (results / f"{name}.json").write_text(json.dumps(changed), "utf-8")
    monkeypatch.setattr(numbers, "RESULTS", results)
    assert any(numbers.filled(text) != text for text in pages.values())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_it_depends_on(path: Path, bench: Any, tmp_path: Path) -> None:
    bench("record").write(tmp_path / "new.json", [{"by": "hessfn", "ms": 1.0}])
    new = json.loads((tmp_path / "new.json").read_text("utf-8"))
    found = json.loads(path.read_text("utf-8"))
    assert list(found) in (list(new), [*list(new)[:-1], "note", "rows"])
    assert (ROOT / found["command"].split()[0]).is_file()
    assert all(found[key] for key in ("date", "commit", "torch", "rows"))
    assert found["python"] or "Python" in found["note"]


def test_features_are_those_of_the_script(bench: Any) -> None:
    told = dict.fromkeys(row["feature"] for row in FEATURES)
    assert list(told) == list(bench("bench_features").FEATURES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("row", TRIED, ids=lambda row: f"{row['by']}-{row['feature']}")
def test_a_library_has_what_the_table_says(row: dict[str, Any], bench: Any) -> None:
    features = bench("bench_features")
    pytest.importorskip(features.LIBRARIES[row["by"]])
    why = features.answer(row["feature"], row["by"])
    assert (why is None) == row["has"], why


@pytest.mark.slow
def test_the_summary_that_is_shown_is_that_of_the_demo(tmp_path: Path) -> None:
    """The same lines; of their numbers those that are no small errors to 5 %: machines round otherwise."""
    page = (ROOT / "docs" / "report.md").read_text("utf-8")
    shown = re.search(r"^```text\n(hessfn\.problems:digits\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert shown
    command = [sys.executable, "-m", "hessfn", "report"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    number = re.compile(r"\d[\d,]*\.?\d*(?:e-?\d+)?")
    expected, printed = (
        [line for line in text.strip().splitlines() if "products in" not in line] for text in (shown[1], done.stdout)
    )
    assert [number.sub("#", line).split() for line in printed] == [number.sub("#", line).split() for line in expected]
    for line, other in zip(printed, expected, strict=True):
        for x, y in zip(number.findall(line), number.findall(other), strict=True):
            one, two = (float(z.replace(",", "")) for z in (x, y))
            assert min(one, two) < 0.1 or one == pytest.approx(two, rel=0.05), (line, other)
