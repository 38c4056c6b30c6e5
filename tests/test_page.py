from __future__ import annotations

import copy
import gzip
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from pages import Parsed, contrast, palettes
from reports import changed, report_of, trained, truth

from hessfn.reporting import figures, html, text
from hessfn.reporting.bars import Scale, scale_of
from hessfn.reporting.text import estimate, largest_errors, number, share, summary

NASTY = "</script><img src=x>$\\frac$"
NET = truth(trained())


def renamed(result: dict[str, Any]) -> dict[str, Any]:
    layers = {f"{NASTY}.{name}": layer for name, layer in result["layers"].items()}
    return changed(result, layers=layers, settings__problem=NASTY, settings__command="hessfn report 'a<b'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Parsed]:
    out, settings, result = tmp_path_factory.mktemp("report"), dict(mpl.rcParams), renamed(report_of(NET))
    html.write(out, html.template(), result)
    assert dict(mpl.rcParams) == settings
    assert json.loads((out / "report.json").read_text()) == result
    page = (out / "report.html").read_text()
    return result, page, Parsed(page)


def page_of(result: dict[str, Any]) -> str:
    """The words of a page, without its pictures."""
    images = dict.fromkeys(("density", "eigenvalues", "layers", "landscape", "plane"), figures.Picture("", ""))
    return " ".join(Parsed(html.rendered(html.template(), result, images)).shown.split())


def test_page_needs_no_other_file_and_says_what_its_pictures_show(made: Any) -> None:
    _, page, parsed = made
    assert len(parsed.images) == 4
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert not re.search(r"url\(|@import|https?:", page)
    assert all(attrs["alt"] for attrs in parsed.images)
    assert all(attrs["aria-label"] for tag, attrs in parsed.tags if "data-chart" in attrs)


def test_page_is_small_enough_to_send(made: Any) -> None:
    assert len(made[1]) < 1.1e6


@pytest.mark.slow
def test_page_of_a_large_net_stays_below_its_limit(tmp_path: Path) -> None:
    """As ResNet50 has: 161 tensors, 20 eigenvalues, a density at 1000 points, a plane of 31 by 31 points."""
    result = report_of(NET)
    layer, curve = result["layers"]["0.bias"], [1 / 3 + i / 7 for i in range(1000)]
    plane = {"steps": curve[:31], "losses": [curve[:31]] * 31, "measured": None, "directions": ["a", "b"]}
    columns = dict.fromkeys(("eigenvalues", "residuals", "rounding", "data_stderr"), curve[:20])
    large = changed(
        result,
        layers={f"layer{i}.conv.weight": changed(layer, trace=10.0 ** (-i % 7) / 3) for i in range(161)},
        density=dict.fromkeys(("grid", "values", "lower", "upper"), curve),
        landscape__plane=plane,
        converged=[True] * 20,
        **columns,
    )
    html.write(tmp_path, html.template(), large)
    assert (tmp_path / "report.html").stat().st_size < 1.5e6


def test_names_cannot_leave_their_place(made: Any) -> None:
    _, page, parsed = made
    assert "<img src=x>" not in page
    assert f"{NASTY}.0.weight" in parsed.shown
    assert f"Curvature of {NASTY}" in parsed.shown
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 5


def test_contents_lead_to_every_part(made: Any) -> None:
    _, _, parsed = made
    headings = [attrs["id"] for tag, attrs in parsed.tags if tag == "h2"]
    linked = [attrs["href"] for tag, attrs in parsed.tags if tag == "a" and attrs.get("class") != "anchor"]
    assert linked == [f"#{heading}" for heading in headings]
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_page_says_what_was_looked_at_and_what_it_took(made: Any) -> None:
    result, _, parsed = made
    words = " ".join(parsed.shown.split())
    loss_with_error = estimate(result["loss"], result["loss_data_stderr"]).replace("+-", "±")
    for said in (
        "Sequential, 2 layers, 57 parameters, in eval mode", "60 samples in 4 batches of 15", "CrossEntropyLoss",
        loss_with_error, "90.0 ± 3.9 %", "0.0123", "2026-11-26 04:00:00Z",
        "87 products in 12.3 s, 2 threads, float64 on cpu, with the compiled kernel", "hessfn report 'a<b'",
        *result["versions"].values(),
    ):  # fmt: skip
        assert said in words, said


def test_sharpness_has_all_four_errors_and_the_largest_is_named(made: Any) -> None:
    result, page, _ = made
    (row,) = [line for line in page.splitlines() if '<th scope="row" class="text">sharpness</th>' in line]
    at = page.index(row)
    cells = re.findall(r"<td>(.*?)</td>", page[at : page.index("</tr>", at)])
    found = result["sharpness"]
    assert cells == [number(found["value"]), "1e-06", "\N{EN DASH}", "1e-09", f"<b>{found['data_stderr']:.2g}</b>"]
    words = " ".join(Parsed(page).shown.split())
    assert f"between {number(found['lower'])} and {number(found['upper'])}, in 19 of 20 cases" in words
    assert (
        "The largest error of the sharpness, the trace and the smallest eigenvalue is the choice of the data" in words
    )


def test_sentences_on_errors_name_the_remedy() -> None:
    numbers = {"trace": {"stderr": 2.0, "rounding": None, "data_stderr": 1.0}, "sharpness": {"residual": 0.0}}
    assert largest_errors(numbers) == [
        "The largest error of the trace is that of the random probes: more probes would make it smaller."
    ]


def test_charts_have_the_numbers_of_the_report(made: Any) -> None:
    result, _, parsed = made
    data = json.loads(parsed.scripts["charts"])
    (spectrum,) = data["spectrum"]["curves"]
    for name in ("grid", "values", "lower", "upper"):
        assert spectrum[name] == pytest.approx(result["density"][name], rel=1e-5)
    assert spectrum["eigenvalues"] == pytest.approx(result["eigenvalues"], rel=1e-5)
    assert data["surface"]["losses"][2][2] == pytest.approx(result["loss"], rel=1e-5)
    # One eigenvalue of n has a peak of 1 / n of the highest possible one: it is above the floor.
    assert 0 < data["spectrum"]["floor"] <= max(result["density"]["values"]) / (50 * result["model"]["parameters"])


def test_numbers_to_download_are_those_of_the_report_to_the_last_bit(made: Any) -> None:
    result, _, parsed = made
    assert json.loads(parsed.scripts["numbers"]) == {name: x for name, x in result.items() if name != "samples"}


def test_layers_are_bars_on_a_logarithmic_axis() -> None:
    scale = scale_of([{"trace": x} for x in (0.03, -2.0, 500.0, 0.0, None)])
    assert scale == Scale(-2, 3)
    bar = scale.bar(-10.0, 3.0, 4.0)
    assert (bar.width, bar.negative) == (60.0, True)
    assert (bar.lower, bar.upper) == (scale.at(5.0), scale.at(15.0))
    assert scale.bar(0.001).width == 0 and scale.bar(None) is None
    assert scale_of([{"trace": 1e-30}, {"trace": 1.0}]).low == -5  # six decades are enough
    assert all(0 <= place <= 100 for _, place in scale.ticks)


def test_what_was_not_computed_is_not_shown() -> None:
    less = changed(
        report_of(NET), sharpness=None, accuracy=None, activations=None, landscape__plane=None, density__lower=None,
        density__upper=None, rounding=None, data_stderr=None, negative_curvature__smallest=None,
    )  # fmt: skip
    words = page_of(less)
    assert "nothing says how far another one would lie" in words
    assert "Over a plane" not in words and "Sharpness" not in words and "not a classifier" in words
    assert max(map(len, summary(less).splitlines())) <= 80


def test_values_that_are_not_finite_are_said_on_the_page() -> None:
    result = copy.deepcopy(report_of(NET))
    layer = dict.fromkeys(result["layers"]["0.bias"], None) | {"numel": 3}
    words = page_of(changed(result, layers={"a": layer}, trace=dict.fromkeys(result["trace"], None)))
    assert "not finite" in words and "unknown" in words


def test_colours_meet_the_contrast_that_accessibility_asks_for() -> None:
    css = resources.files("hessfn").joinpath("reporting/templates/page.css").read_text("utf-8")
    light, dark = palettes(css)
    assert light["page"] != dark["page"]
    for colors in (light, dark):
        for background in (colors["page"], colors["card"]):
            assert all(contrast(colors[name], background) >= 4.5 for name in ("text", "soft", "link"))
            assert all(contrast(colors[name], background) >= 3 for name in ("first", "second", "third"))
    assert figures.DARK["figure.facecolor"] == dark["page"]
    assert figures.DARK["text.color"] == dark["text"]


def test_numbers_of_charts_keep_six_digits() -> None:
    assert html.short({"a": [1 / 3, None, 2, "x", float("nan")]}) == {"a": [0.333333, None, 2, "x", None]}


def test_shares_are_in_percent() -> None:
    assert share(0.0503, 0.0234) == "5.0 +- 2.3 %"
    assert share(0.25, None) == "25 +- not finite %"


def test_summary_has_every_error_in_eighty_columns() -> None:
    result = changed(report_of(NET), settings__problem="very/" * 40, converged=[True, False, True])
    lines = summary(result).splitlines()
    assert max(map(len, lines)) <= 80
    (trace,) = [line for line in lines if line.startswith("trace  ")]
    found = result["trace"]
    assert trace.split() == ["trace", number(found["mean"]), "-"] + [
        f"{found[name]:.2g}" for name in ("stderr", "rounding", "data_stderr")
    ]
    (marked,) = [line for line in lines if "eigenvalue 2" in line]
    assert marked.endswith(" *") and "  * not converged to the tolerance" in lines
    early = changed(report_of(NET), negative_curvature__smallest__converged=False)
    (marked,) = [line for line in summary(early).splitlines() if line.endswith(" *")]
    assert marked.startswith("smallest eigenvalue") and "  * not converged to the tolerance" in summary(early)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert text.printable("a\x1b[31m\n\u202e\ud800é中") == "a\\x1b[31m\\n\\u202e\\ud800é中"
    lines = summary(changed(report_of(NET), settings__problem="\x1b]0;x\x07", model__name="a\rb"))
    assert "".join(lines.splitlines()).isprintable()


def test_the_library_that_draws_is_whole_and_has_its_licence() -> None:
    templates = resources.files("hessfn.reporting").joinpath("templates")
    script = gzip.decompress(templates.joinpath(html.PLOTLY).read_bytes()).decode()
    assert "plotly.js (gl3d - minified) v4.1.1" in script[:200] and "MIT" in script[:300]
    assert "MIT" in templates.joinpath("plotly-LICENSE.txt").read_text()
