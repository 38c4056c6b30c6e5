"""The pages in a real browser: Debian's chromium and chromium-driver, which .ci/run installs."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import MARKS, chromium
from reports import changed, report_of, trained, truth, written

from hessfn.reporting import html
from hessfn.reporting.compare import compare

pytestmark = [*MARKS, pytest.mark.slow]
NASTY = "</script><script>document['title'] = 'broken'</script>$x"


def renamed(result: dict[str, Any]) -> dict[str, Any]:
    """A layer, a problem and a model whose names are markup, and a layer whose trace is not known."""
    layers = {**result["layers"], NASTY: {**result["layers"]["2.bias"], "trace": None}}
    return changed(result, layers=layers, settings__problem=NASTY, model__name=NASTY, samples=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pages")
    nets = [report_of(truth(trained(num))) for num in (40, 60, 80)]
    folders = [written(where / name, renamed(net)) for name, net in zip("abc", nets, strict=True)]
    html.write(where / "a", html.template(), renamed(nets[0]))
    compare(*folders[:2], out=where / "two.html")
    compare(*folders, out=where / "three.html")
    return where


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    flags = "--enable-unsafe-swiftshader", "--hide-scrollbars"
    with chromium(tmp_path_factory.mktemp("profile"), *flags, seconds=60) as driver:
        yield driver


@pytest.fixture(scope="module", params=["a/report.html", "two.html", "three.html"])
def page(request: Any, browser: Any, folder: Path) -> Any:
    """The browser with a page open, every chart drawn."""
    browser.get((folder / request.param).as_uri())
    wait(browser, "document.documentElement.dataset.charts")
    return browser


def wait(page: Any, condition: str) -> None:
    page.execute_async_script(f"const look = () => {condition} ? arguments[0]() : setTimeout(look, 30); look();")


def media(page: Any, *, scheme: str = "light", kind: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features, "media": kind})


def test_pages_draw_all_they_have_and_ask_for_nothing(page: Any) -> None:
    shown = """return [...document.querySelectorAll("[data-chart]")].map((chart) => !chart.hidden &&
        chart.offsetHeight > 200 && chart.querySelector(".main-svg, canvas") !== null)"""
    charts = page.execute_script(shown)
    assert charts and all(charts)
    assert page.execute_script("return [...document.images].every((image) => image.complete && image.naturalWidth)")
    loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in page.execute_script(loaded) if not name.startswith(("data:", "blob:"))] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.title.startswith("Curvature of ")  # no name has become a script
    titles = page.execute_script("return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert not [title for title in titles if "cloud" in (title or "").lower()]


def column(page: Any, number: int) -> list[str]:
    rows = "return [...document.querySelectorAll('#layer-table tbody tr')]"
    return page.execute_script(
        f"{rows}.map((row) => row.cells[{number}].dataset.value ?? row.cells[{number}].innerText)"
    )


def test_tables_are_sorted_with_the_keyboard(page: Any) -> None:
    before = column(page, 0)
    headers = page.find_elements("css selector", "#layer-table thead th")
    button = headers[3].find_element("tag name", "button")
    for order, sign in (("descending", -1), ("ascending", 1)):
        page.execute_script("arguments[0].focus()", button)
        page.switch_to.active_element.send_keys("\n")
        assert headers[3].get_attribute("aria-sort") == order
        found = column(page, 3)
        values = [float(value) for value in found if value]
        assert values == sorted(values, key=lambda value: sign * value)
        assert all(found[: len(values)])  # what there is no number of comes last
        assert sorted(column(page, 0)) == sorted(before)
    headers[0].find_element("tag name", "button").click()
    assert [name for name in column(page, 0) if name[0].isdigit()] == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for _ in range(2):
        headers[1].find_element("tag name", "button").click()
    assert column(page, 0) == before
    assert len(page.find_elements("css selector", "#layer-table [aria-sort]")) == 1


def test_layers_are_filtered_by_a_part_of_their_names(page: Any) -> None:
    entry = page.find_element("css selector", "[data-filter='layer-table']")
    shown = "return [...document.querySelectorAll('#layer-table tbody tr')].filter((row) => row.offsetHeight).length"
    entry.send_keys("BIAS")
    assert page.execute_script(shown) == 2
    assert page.find_element("css selector", ".filter output").text == "2 of 5"
    entry.send_keys("\b\b\b\b")
    assert page.execute_script(shown) == 5


def test_contents_lead_to_their_parts(page: Any) -> None:
    for link in page.find_elements("css selector", "nav a"):
        link.click()
        top = "return document.getElementById(location.hash.slice(1)).getBoundingClientRect().top"
        end = "return scrollY + innerHeight >= document.documentElement.scrollHeight - 2"
        assert -1 <= page.execute_script(top) < 40 or page.execute_script(end)
    page.execute_script("scrollTo(0, 0)")


def test_numbers_are_downloaded_from_the_page(page: Any, folder: Path, tmp_path: Path) -> None:
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    buttons = page.find_elements("css selector", "[data-download]")
    assert len(buttons) >= 3
    for button in buttons:
        button.click()
        file = tmp_path / button.get_attribute("data-download")
        until(lambda file=file: file.exists() and file.stat().st_size > 0)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    with (tmp_path / "layers.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == list(numbers["layers"])
    key = "trace" if "trace" in rows[0] else "mean"
    assert [row[key] for row in rows[:4]] == [repr(layer[key]) for layer in list(numbers["layers"].values())[:4]]
    assert rows[4][key] == ""
    if (tmp_path / "density.csv").exists():
        written_before = json.loads((folder / "a" / "report.json").read_text())
        assert numbers == {name: x for name, x in written_before.items() if name != "samples"}


def until(done: Any) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nothing_is_cut_off_on_a_phone_without_a_sign(page: Any) -> None:
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wait(page, "[...document.querySelectorAll('.main-svg')].every((svg) => svg.clientWidth <= 390)")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    cut = """return [...document.querySelectorAll('.wide')].map((wide) => [wide.scrollWidth > wide.clientWidth + 4,
        wide.previousElementSibling.offsetHeight > 0])"""
    wait(page, "document.querySelectorAll('.hint.on').length > 0")
    signs = page.execute_script(cut)
    assert all(wider == said for wider, said in signs) and any(wider for wider, _ in signs)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_charts_and_pictures_follow_the_colours_of_the_page(page: Any) -> None:
    sources = []
    for scheme, ink in (("dark", "rgb(230, 237, 243)"), ("light", "rgb(27, 31, 36)")):
        media(page, scheme=scheme)
        wait(page, f"getComputedStyle(document.querySelector('.xtitle')).fill === '{ink}'")
        sources.append(page.execute_script("return [...document.images].map((image) => image.currentSrc)"))
    assert all(dark != light for dark, light in zip(*sources, strict=True))


def test_pictures_are_printed_and_charts_are_not(page: Any) -> None:
    seen = """return ['.chart', '.still img'].map((which) => [...document.querySelectorAll(which)]
        .filter((element) => element.getClientRects().length).length)"""
    charts, pictures = (len(page.find_elements("css selector", which)) for which in (".chart", ".still img"))
    media(page, kind="print")
    assert page.execute_script(seen) == [0, pictures]
    media(page)
    replaced = len(page.find_elements("css selector", ".still.replaced"))
    assert page.execute_script(seen) == [charts, pictures - replaced]
    assert replaced > 0


def test_a_printed_heading_stays_with_what_follows(page: Any) -> None:
    media(page, kind="print")
    style = "return [...document.querySelectorAll('h2')].map((h) => getComputedStyle(h).breakAfter)"
    assert set(page.execute_script(style)) == {"avoid"}
    inside = "return [...document.querySelectorAll('figure, tr')].map((x) => getComputedStyle(x).breakInside)"
    assert set(page.execute_script(inside)) == {"avoid"}
    seen = (
        "return [...document.querySelectorAll('nav, .filter, .hint, .downloads')].filter((x) => x.offsetHeight).length"
    )
    assert page.execute_script(seen) == 0
    media(page)
