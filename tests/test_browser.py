"""The pages in a real browser: Debian's chromium and chromium-driver, which .ci/run installs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nets import classes, normal, seeded
from torch import nn

from hessfn.reporting.compare import compare
from hessfn.reporting.run import report

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromium-driver: apt-get install them"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's sockets
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --enable-unsafe-swiftshader --disable-dev-shm-usage --disable-quic "
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
)
NASTY = "</script><script>document['title'] = 'broken'</script>$x"


def net() -> nn.Module:
    model = nn.Sequential()
    for part, layer in (("first", nn.Linear(3, 4)), ("bend", nn.Tanh()), (NASTY, nn.Linear(4, 2))):
        model.add_module(part, layer)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pages")
    problem = seeded(net), nn.CrossEntropyLoss(), [(normal(8, 3), classes(8, 2))]
    report(problem, where / "a", name=NASTY, k=3, num_probes=8, num_runs=2, num_steps=12, num_plane_points=5)
    (where / "b").mkdir()
    other_net = (where / "a" / "report.json").read_text().replace(json.dumps(NASTY)[1:-1], "last")
    (where / "b" / "report.json").write_text(other_net)
    compare(where / "a", where / "b", where / "compare.html")
    return where


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["a/report.html", "compare.html"])
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
    rows = "return [...document.querySelectorAll('#layers tbody tr')]"
    return page.execute_script(
        f"{rows}.map((row) => row.cells[{number}].dataset.value ?? row.cells[{number}].innerText)"
    )


def test_tables_are_sorted_with_the_keyboard(page: Any) -> None:
    before = column(page, 0)
    headers = page.find_elements("css selector", "#layers thead th")
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
    by_name = [name for name in column(page, 0) if name.startswith("first")]
    assert by_name == ["first.bias", "first.weight"]
    for _ in range(2):
        headers[1].find_element("tag name", "button").click()
    assert column(page, 0) == before
    assert len(page.find_elements("css selector", "#layers [aria-sort]")) == 1


def test_pages_fit_a_phone(page: Any) -> None:
    screen = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wait(page, "[...document.querySelectorAll('.main-svg')].every((svg) => svg.clientWidth <= 360)")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
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
