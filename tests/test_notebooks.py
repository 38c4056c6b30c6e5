"""The notebooks are committed as they ran: with their pictures, without errors, warnings or traces of a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [c for c in json.loads(request.param.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def outputs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in cells for output in cell["outputs"]]


def test_it_ran_from_top_to_bottom(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


def test_no_cell_failed_or_warned(cells: list[dict[str, Any]]) -> None:
    for output in outputs(cells):
        assert output["output_type"] != "error"
        assert not re.search(r"\bWarning\b|Warning:|Traceback", "".join(output.get("text", [])))
        assert output.get("name") != "stderr", "".join(output["text"])


def test_it_shows_pictures(cells: list[dict[str, Any]]) -> None:
    assert any("image/png" in output.get("data", {}) for output in outputs(cells))


def test_its_pictures_are_described_for_those_who_do_not_see_them(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            assert cell["metadata"]["mystnb"]["image"]["alt"]


def test_nothing_in_it_is_of_the_machine_it_ran_on(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        texts = ["".join(cell["source"])]
        for output in cell["outputs"]:
            data = output.get("data", {})
            texts += ["".join(output.get("text", [])), *("".join(data[k]) for k in data if k.startswith("text/"))]
        for text in texts:
            assert not re.search(
                r"(?<![\w.~])/(home|root|work|tmp|Users|opt|usr|mnt)/|[A-Z]:\\|0x[0-9a-f]{8,}", text
            ), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_enough_to_be_read_on_the_web(path: Path) -> None:
    assert path.stat().st_size < 1.5e6


# The tutorial that another one stands behind: what is in that one, and where.

TUTORIAL = json.loads((Path(__file__).parents[1] / "notebooks" / "hessian_tutorial.ipynb").read_text("utf-8"))["cells"]
PROSE = "\n\n".join("".join(cell["source"]) for cell in TUTORIAL if cell["cell_type"] == "markdown")
NUM_ORIGINAL = 32  # cells of code in the original


def test_every_cell_of_the_original_has_its_place_in_the_tutorial_in_the_same_order() -> None:
    headings = [heading.strip() for heading in re.findall(r"^##+ (.+)$", PROSE, re.MULTILINE)]
    table = PROSE.partition("## Where each cell of the original went")[2]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    numbers = [int(number) for row in rows for number in re.findall(r"\d+", row[0])]
    assert numbers == list(range(1, NUM_ORIGINAL + 1))

    def place(section: str) -> int:
        (found,) = [i for i, heading in enumerate(headings) if re.match(re.escape(section) + r"(\W|$)(?!\d)", heading)]
        return found

    places = [place(section) for row in rows for section in re.findall(r"\*(.+?)\*", row[2])]
    assert places == sorted(places)
    assert len(set(places)) > 12


def test_numbers_of_the_original_are_those_of_its_edition() -> None:
    everything = PROSE + "".join("".join(cell["source"]) for cell in TUTORIAL if cell["cell_type"] == "code")
    for number in ("21.3926", "21.3920", "147.6936", "147.6954", "125.3500", "296.7292", "0.6591"):
        assert number in everything, number
    for number in ("26.03", "25.69"):
        assert number not in everything
    for paragraph in PROSE.split("\n\n"):
        assert "195." not in paragraph or "earlier edition" in paragraph


def test_claims_of_the_tutorial_are_asserted() -> None:
    code = ["".join(cell["source"]) for cell in TUTORIAL if cell["cell_type"] == "code"]
    assert sum(bool(re.search(r"^assert ", source, re.MULTILINE)) for source in code) > 15
