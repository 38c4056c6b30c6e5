from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from nets import classes, normal, seeded
from pages import Parsed, contrast, palettes
from torch import nn

import hessfn as hf
from hessfn.estimators.spectral_sums import negative_share
from hessfn.reporting import html
from hessfn.reporting.run import report
from hessfn.reporting.text import number, share

NASTY = "</script><img src=x>$\\frac$"


def problem() -> tuple[Any, Any, Any]:
    model = nn.Sequential()
    model.add_module(NASTY, seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))))
    return model, nn.CrossEntropyLoss(), [(normal(5, 3), classes(5, 2)), (normal(3, 3, seed=3), classes(3, 2, seed=4))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Parsed]:
    out = tmp_path_factory.mktemp("report")
    settings = dict(mpl.rcParams)
    options: dict[str, Any] = {"k": 3, "num_probes": 20, "num_runs": 2, "num_steps": 12, "num_plane_points": 5}
    result = report(problem(), out, name=NASTY, command="hessfn report 'a<b'", **options)
    assert dict(mpl.rcParams) == settings
    text = (out / "report.html").read_text()
    return result, text, Parsed(text)


def test_page_needs_no_other_file_and_says_what_its_pictures_show(made: Any) -> None:
    _, text, parsed = made
    assert len(parsed.images) >= 5
    assert len(parsed.links) == 2 * len(parsed.images) + 1  # each picture in two colours; an icon
    assert all(link.startswith("data:") for link in parsed.links)
    assert not re.search(r"url\(|@import|https?:", text)
    assert all(attrs["alt"] for attrs in parsed.images)
    assert all(attrs["aria-label"] for tag, attrs in parsed.tags if "data-chart" in attrs)


def test_page_is_small_enough_to_send(made: Any) -> None:
    assert len(made[1]) < 5e6


def test_names_cannot_leave_their_place(made: Any) -> None:
    _, text, parsed = made
    assert "<img src=x>" not in text
    assert f"{NASTY}.0.weight" in parsed.shown
    assert f"Curvature of {NASTY}" in parsed.shown
    assert len(re.findall("<script", text)) == len(re.findall("</script", text)) == 3


def test_page_says_how_sure_and_how_to_do_it_again(made: Any) -> None:
    result, _, parsed = made
    words = " ".join(parsed.shown.split())
    assert "hessfn report 'a<b'" in words
    assert "All 3 eigenvalues reached the tolerance" in words
    assert f"{100 * result['trace']['stderr'] / result['trace']['mean']:.2g} %" in words
    for value in (*result["versions"].values(), number(result["loss"]), number(result["eigenvalues"][0])):
        assert value in words


def test_charts_have_the_numbers_of_the_report(made: Any) -> None:
    result, _, parsed = made
    data = json.loads(parsed.scripts["data"])
    (spectrum,) = data["spectrum"]
    for name in ("grid", "values", "lower", "upper"):
        assert spectrum[name] == pytest.approx(result["density"][name], rel=1e-5)
    assert spectrum["eigenvalues"] == pytest.approx(result["eigenvalues"], rel=1e-5)
    assert data["surface"]["losses"][2][2] == pytest.approx(result["loss"], rel=1e-5)


def test_plane_is_over_the_top_two_eigenvectors(made: Any) -> None:
    result, _, _ = made
    plane, line = result["landscape"]["plane"], result["landscape"]
    middle = [row[2] for row in plane["losses"]]
    assert plane["steps"][0] == line["steps"][0]
    assert middle[0] == pytest.approx(line["losses"]["top eigenvector"][0], rel=1e-10)
    step = plane["steps"][1] - plane["steps"][0]
    for losses, value in ((middle, result["eigenvalues"][0]), (plane["losses"][2], result["eigenvalues"][1])):
        # The fourth difference takes the error of the second one away.
        bend = (-losses[0] + 16 * losses[1] - 30 * losses[2] + 16 * losses[3] - losses[4]) / (12 * step**2)
        assert bend == pytest.approx(value, rel=0.02)


def test_negative_curvature_is_the_share_of_all_curvature(made: Any) -> None:
    nodes = torch.tensor([[-1.0, 3.0], [-2.0, 2.0]])
    found = negative_share(hf.Quadrature(nodes, torch.full((2, 2), 0.5)))
    assert found.mean == pytest.approx(3 / 8)
    assert found.stderr == pytest.approx(1 / 8)  # the shares are a quarter and a half, of the same whole
    assert 0 < made[0]["negative_curvature"]["mean"] < 1


def test_one_eigenvalue_has_no_plane_and_one_run_no_band(tmp_path: Path) -> None:
    result = report(problem(), tmp_path, k=1, num_probes=2, num_runs=1, num_steps=3)
    assert result["landscape"]["plane"] is None
    assert result["density"]["lower"] is result["negative_curvature"]["stderr"] is None
    text = Parsed((tmp_path / "report.html").read_text()).shown
    assert "nothing says how far another one would lie" in " ".join(text.split())
    assert not (tmp_path / "plane.png").exists()


def test_without_a_command_line_the_page_says_the_call_in_python(tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 2, "num_probes": 2, "num_runs": 1, "num_steps": 3, "params": [f"{NASTY}.2.*"]}
    options |= {"num_plane_points": 0, "num_activation_probes": 2, "num_batches": 1, "which": "LA"}
    result = report(problem(), tmp_path / "first", name="here", **options)
    (call,) = re.findall(r"hf\.report\(.*\)", Parsed((tmp_path / "first" / "report.html").read_text()).shown)
    again = eval(call, {"hf": hf, "problem": problem(), "out": tmp_path / "again"})
    assert {**again, "settings": None} == {**result, "settings": None}
    assert again["settings"] == {**result["settings"], "problem": ""}


def test_colours_meet_the_contrast_that_accessibility_asks_for() -> None:
    css = resources.files("hessfn").joinpath("reporting/templates/page.css").read_text("utf-8")
    light, dark = palettes(css)
    assert light["page"] != dark["page"]
    for colors in (light, dark):
        for background in (colors["page"], colors["card"]):
            assert all(contrast(colors[name], background) >= 4.5 for name in ("text", "soft", "link"))
            assert all(contrast(colors[name], background) >= 3 for name in ("first", "second", "third"))
    assert html.DARK["figure.facecolor"] == dark["page"]
    assert html.DARK["text.color"] == dark["text"]


def test_numbers_of_charts_keep_six_digits() -> None:
    assert html.short({"a": [1 / 3, None, 2, "x"]}) == {"a": [0.333333, None, 2, "x"]}


def test_shares_are_in_percent() -> None:
    assert share(0.0503, 0.0234) == "5.0 +- 2.3 %"
    assert share(0.25, None) == "25 +- not finite %"


def test_values_that_are_not_finite_are_said_on_the_page(made: Any) -> None:
    result = copy.deepcopy(made[0])
    result["layers"] = {"a": {"numel": 3, "trace": None, "stderr": None}}
    result["trace"]["stderr"] = None
    images = defaultdict(lambda: html.Picture("", ""))
    text = html.template().render(**result, images=images, top_index=0, data={}, call="")
    shown = " ".join(Parsed(text).shown.split())
    assert "not finite" in shown
    assert "unknown size" in shown
