"""What a report looks like: the page with all its pictures and numbers in it."""

from __future__ import annotations

import base64
import functools
import json
import math
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessfn.core.errors import MissingExtra
from hessfn.reporting import text
from hessfn.reporting.bars import scale_of
from hessfn.reporting.figures import floor_of, pictures
from hessfn.reporting.options import Options

if TYPE_CHECKING:
    import jinja2

# Plotly's own partial bundle, in gzip: a page has it in it, to work offline. The whole library is twice as large.
PLOTLY = "plotly-gl3d-4.1.1.min.js.gz"


def template(name: str = "report.html.j2") -> jinja2.Template:
    """A page's template; asked for before anything is computed, as what makes the page may be missing."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra('the page is made with jinja2: pip install "hessfn[demo]"') from error
    # Names of layers and problems are the user's: everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hessfn.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # curves stay in their order
    environment.filters.update(
        number=text.number, setting=text.setting, error=_error, value=_value, breakable=_breakable, finite=text.finite
    )
    environment.globals.update(
        estimate=text.estimate,
        share=text.share,
        with_error=text.with_error,
        plotly=_packed,
        scale_of=scale_of,
        largest_error=text.largest_error,
    )
    return environment.get_template(name)


def write(folder: Path, template: jinja2.Template, result: dict[str, Any]) -> None:
    """Writes ``report.json``, the figures and ``report.html``, which needs none of the others."""
    images = pictures(result)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(base64.b64decode(image.light))
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / "report.html").write_text(rendered(template, result, images), "utf-8")


def rendered(template: jinja2.Template, result: dict[str, Any], images: dict[str, Any]) -> str:
    """The page of a result."""
    shown = {name: value for name, value in result.items() if name != "samples"}
    return template.render(
        **{
            **result,
            **{name: result[name] or [None] * len(result["eigenvalues"]) for name in ("rounding", "data_stderr")},
        },
        images=images,
        headline=text.headline(result),
        error_names=list(text.ERRORS),
        largest_errors=text.largest_errors,
        charts=_chart_data(result),
        numbers=shown,
        call=_call(result["settings"]),
    )


def short(x: Any) -> Any:
    """Numbers to six digits, which is what a picture can show of them."""
    if isinstance(x, dict):
        return {key: short(value) for key, value in x.items()}
    if isinstance(x, list):
        return [short(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) and math.isfinite(x) else None if isinstance(x, float) else x


@functools.cache
def _packed() -> str:
    """The library that draws the charts, in gzip and base64."""
    packed = resources.files("hessfn.reporting").joinpath(f"templates/{PLOTLY}").read_bytes()
    return base64.b64encode(packed).decode()


def _chart_data(result: dict[str, Any]) -> dict[str, Any]:
    """What charts.js draws the interactive charts from."""
    landscape, points = result["landscape"], {name: result[name] for name in ("eigenvalues", "residuals")}
    spectrum = {"curves": [{"name": "", **result["density"], **points}], "floor": floor_of([result])}
    lines = {name: landscape[name] for name in ("steps", "losses")}
    return {**short({"spectrum": spectrum, "lines": lines}), "surface": short(landscape["plane"])}


def _call(settings: dict[str, Any]) -> str:
    """The report's call in Python, where there was no command line."""
    options = {option.name for option in fields(Options)} - {"command"}
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if name in options)
    return f"hf.report(problem, out, {given})"


def _error(estimate: str) -> Any:
    """An estimate with its error in small letters; an exact one has none."""
    from markupsafe import Markup, escape

    mean, _, error = estimate.partition(" +- ")
    return Markup(f"{escape(mean)} <small>&plusmn; {escape(error)}</small>") if error else escape(mean)


def _breakable(name: str) -> Any:
    """A name that may be broken into lines after its dots and underscores."""
    from markupsafe import Markup, escape

    return escape(text.printable(name)).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _value(x: float | None) -> str:
    """The text that a column sorts by."""
    return "" if x is None or math.isnan(x) else repr(x)
