from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pages import Parsed

from hessfn.reporting.cli import main
from hessfn.reporting.compare import compare, difference, summary
from hessfn.reporting.side import Measured, read

LAYERS = {"conv.weight": (72, 6.0, 0.3), "conv.bias": (8, 2.0, 0.4), "head.weight": (40, 1.0, 0.2)}
REPORT: dict[str, Any] = {
    "loss": 0.25,
    "eigenvalues": [9.0, 4.0],
    "residuals": [1e-3, 0.5],
    "converged": [True, False],
    "trace": {"mean": 9.0, "stderr": 0.3},
    "negative_curvature": {"mean": 0.1, "stderr": 0.01},
    "density": {"grid": [-1.0, 0.0, 9.0], "values": [0.1, 1.0, 0.01], "lower": None, "upper": None},
    "layers": {name: {"numel": n, "trace": x, "stderr": e} for name, (n, x, e) in LAYERS.items()},
    "activations": {name: {"numel": 64, "trace": 3.0, "stderr": 0.3} for name in ("conv", "head")},
    "landscape": {},
    "settings": {
        "problem": "net",
        "num_parameters": 120,
        "num_samples": 10,
        "which": "LM",
        "num_probes": 100,
        "num_runs": 4,
        "num_activation_probes": 30,
        "seed": 0,
    },
    "versions": {"torch": "2.14.1"},
}


def folder(where: Path, **changes: Any) -> Path:
    """A folder with ``report.json``; ``a__b=x`` changes its entry ``a``, ``b``."""
    result = copy.deepcopy(REPORT)
    for path, value in changes.items():
        *outer, last = path.split("__")
        inner = result
        for name in outer:
            inner = inner[name]
        inner[last] = value
    where.mkdir()
    (where / "report.json").write_text(json.dumps(result))
    return where


def test_a_report_does_not_differ_from_itself(tmp_path: Path) -> None:
    a = read(folder(tmp_path / "a"))
    result = difference(a, a)
    assert not any(differs for _, _, differs in result["eigenvalues"])
    compared = [result["trace"], result["negative_curvature"], *result["layers"].values()]
    assert all(by.mean == by.units == 0 and not by.differs for by in compared)
    assert result["only"] == {"A": [], "B": []}


def test_differences_are_in_units_of_the_combined_error(tmp_path: Path) -> None:
    a, b = read(folder(tmp_path / "a")), read(folder(tmp_path / "b", trace={"mean": 10.0, "stderr": 0.4}))
    by = difference(a, b)["trace"]
    assert (by.mean, by.stderr, by.units) == pytest.approx((1.0, 0.5, 2.0))
    assert by.differs  # Student's t of 99 degrees of freedom: 1.98
    few = [side._replace(num_probes=10) for side in (a, b)]
    assert not difference(*few)["trace"].differs  # of 9: 2.26
    assert difference(b, a)["trace"].units == pytest.approx(-2.0)


def test_layers_must_differ_by_more_the_more_of_them_there_are(tmp_path: Path) -> None:
    a, b = read(folder(tmp_path / "a")), read(folder(tmp_path / "b"))
    layers = {**b.layers, "conv.weight": (72, Measured(6.0 + 2.2 * math.hypot(0.3, 0.3), 0.3))}
    found = difference(a, b._replace(layers=layers))
    assert found["layers"]["conv.weight"].units == pytest.approx(2.2)
    assert not found["layers"]["conv.weight"].differs  # one of three
    alone = {"conv.weight": layers["conv.weight"]}
    assert difference(a, b._replace(layers=alone))["layers"]["conv.weight"].differs


def test_eigenvalues_differ_where_their_residuals_cannot_meet(tmp_path: Path) -> None:
    a, b = read(folder(tmp_path / "a")), read(folder(tmp_path / "b", eigenvalues=[9.01, 4.9]))
    assert [differs for _, _, differs in difference(a, b)["eigenvalues"]] == [True, False]
    other_end = b._replace(which="SA")
    assert not any(differs for _, _, differs in difference(a, other_end)["eigenvalues"])


def test_an_unknown_error_leaves_the_difference_unknown(tmp_path: Path) -> None:
    a, b = read(folder(tmp_path / "a")), read(folder(tmp_path / "b", trace={"mean": 99.0, "stderr": None}))
    by = difference(a, b)["trace"]
    assert math.isnan(by.units) and not by.differs
    exact = [side._replace(trace=Measured(x, 0.0)) for side, x in ((a, 1.0), (b, 2.0))]
    assert difference(*exact)["trace"].differs


def test_page_sets_two_nets_side_by_side(tmp_path: Path) -> None:
    layers = {"</script><b>": {"numel": 5, "trace": 4.0, "stderr": 0.1}, "conv.bias": {**REPORT["layers"]["conv.bias"]}}
    a = folder(tmp_path / "a", settings__problem="<i>")
    b = folder(tmp_path / "b", layers=layers, settings__seed=7, trace={"mean": 19.0, "stderr": 0.4})
    result = compare(a, b, tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.html"]
    parsed, shown = Parsed(text), " ".join(Parsed(text).shown.split())
    assert result["only"] == {"A": ["conv.weight", "head.weight"], "B": ["</script><b>"]}
    for words in ("</script><b>", "<i>", "+20.0, differ", "only in A", "only in B", "seed07"):
        assert words in shown
    assert "<b>" not in text and "<i>" not in text
    assert [one["name"] for one in json.loads(parsed.scripts["data"])["spectrum"]] == ["A", "B"]
    assert all(link.startswith("data:") for link in parsed.links)
    assert all(image["alt"] for image in parsed.images)


def test_activations_are_compared_where_both_have_them(tmp_path: Path) -> None:
    a = folder(tmp_path / "a")
    b = folder(tmp_path / "b", activations__conv={"numel": 64, "trace": 4.0, "stderr": 0.1})
    c = folder(tmp_path / "c", activations=None)
    found = compare(a, b, tmp_path / "page.html")["activations"]
    assert {name: (by.mean, by.differs) for name, by in found.items()} == {"conv": (1.0, True), "head": (0.0, False)}
    assert 'id="activations"' in (tmp_path / "page.html").read_text()
    sides = read(a), read(b)
    assert "1 of 2 layers that both have differ in the trace of what enters" in summary(*sides, difference(*sides))
    assert compare(a, c, tmp_path / "page.html")["activations"] == {}
    assert 'id="activations"' not in (tmp_path / "page.html").read_text()


def test_summary_fits_a_terminal(tmp_path: Path) -> None:
    a = read(folder(tmp_path / "a", eigenvalues=[-1.23456789e-12, 4.0], layers__conv=REPORT["layers"]["conv.weight"]))
    b = read(folder(tmp_path / "b", trace={"mean": -1e7, "stderr": 123.4}, loss=1e-30))
    longer = a._replace(folder="very/" * 30), b._replace(layers={x: (1, Measured(-1e9, 12.0)) for x in a.layers})
    lines = summary(*longer, difference(*longer)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "4 of 4 layers that both have differ in trace" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no report in '.*b' .*hessfn report PROBLEM --out"),
        ("{", "is not JSON"),
        ("[1, 2]", "is not a report of this version of hessfn"),
        ("{}", r"is not a report of this version of hessfn \(it has no 'settings'\); .* makes one"),
        (
            json.dumps({**REPORT, "eigenvalues": "many"}),
            r"is not a report of this version of hessfn \(could not convert",
        ),
        (json.dumps({**REPORT, "settings": {"which": "LM", "probes": 100}}), "it has no 'num_probes'"),
        (json.dumps({**REPORT, "layers": {"a": 3}}), "is not a report of this version of hessfn"),
    ],
)
def test_folders_without_a_report_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), tmp_path / "b"
    b.mkdir()
    if text is not None:
        (b / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare(a, b, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_a_page_and_prints_a_summary(tmp_path: Path, capsys: Any) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", trace={"mean": 19.0, "stderr": 0.4})
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "+20.0 errors: differ" in printed
    assert printed.strip().endswith(f"page: {tmp_path / 'page.html'}")
    assert main(["compare", str(a), str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.startswith("hessfn: error: there is no report in")
