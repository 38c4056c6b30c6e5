"""What a report looks like: the figures, and the page with all of them in it."""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from hessfn.core.errors import MissingExtra
from hessfn.plotting import plot
from hessfn.reporting.analysis import Analysis
from hessfn.reporting.options import Options
from hessfn.reporting.text import estimate, number, setting, share

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes


# As in page.css.
DARK = {
    **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor"], "#12161c"),
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"], "#e6edf3"),
}


class Picture(NamedTuple):
    """PNG for light and for dark pages, in base64."""

    light: str
    dark: str


def template(name: str = "report.html.j2") -> jinja2.Template:
    """A page's template; asked for before anything is computed, as what makes the page may be missing."""
    try:
        import jinja2
        import plotly.offline
    except ImportError as error:
        raise MissingExtra('the page is made with jinja2 and plotly: pip install "hessfn[demo]"') from error
    # Names of layers and problems are the user's: everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hessfn.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # curves stay in their order
    environment.filters.update(number=number, setting=setting, error=_error, value=_value, breakable=_breakable)
    library = plotly.offline.get_plotlyjs
    environment.globals.update(estimate=estimate, share=share, plotly=lambda: _packed(library()))
    return environment.get_template(name)


def write(folder: Path, template: jinja2.Template, analysis: Analysis, result: dict[str, Any]) -> None:
    """Writes ``report.json``, the figures and ``report.html``, which needs none of the others."""
    images = {}
    for name, draw in _figures(analysis).items():
        height = plot.layer_plot_height(len(result[name])) if name in ("layers", "activations") else 3.8
        images[name] = picture(draw, height)
        (folder / f"{name}.png").write_bytes(base64.b64decode(images[name].light))
    page = template.render(
        **result,
        images=images,
        top_index=int(analysis.spectrum.eigen.values.abs().argmax()),
        data=_chart_data(result),
        call=_call(result["settings"]),
    )
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / "report.html").write_text(page, "utf-8")


def picture(draw: Callable[[Axes], Any], height: float) -> Picture:
    """What ``draw(axes)`` draws, ``height`` inches high."""

    def png(colors: dict[Any, Any]) -> str:
        with mpl.rc_context(colors):
            figure = Figure(figsize=(6.4, height), layout="constrained")  # no pyplot: no display, no global state
            draw(figure.subplots())
            file = io.BytesIO()
            figure.savefig(file, dpi=144)
        return base64.b64encode(file.getvalue()).decode()

    return Picture(png({}), png(DARK))


def short(x: Any) -> Any:
    """Numbers to six digits, which is what a picture can show of them."""
    if isinstance(x, dict):
        return {key: short(value) for key, value in x.items()}
    if isinstance(x, list):
        return [short(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


@functools.cache
def _packed(script: str) -> str:
    """A script in gzip and base64. The page has the whole library in it, to work offline: 2 MB instead of 5."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _figures(analysis: Analysis) -> dict[str, Callable[[Axes], Any]]:
    spectrum, landscape, activations = analysis.spectrum, analysis.landscape, analysis.activations
    figures: dict[str, Callable[[Axes], Any]] = {
        "density": lambda ax: plot.density_plot(spectrum.density, ax, band=spectrum.band),
        "eigenvalues": lambda ax: plot.eigen_plot(spectrum.eigen, ax),
        "layers": lambda ax: plot.layer_plot(spectrum.layers, ax),
        "landscape": lambda ax: plot.line_plot(landscape.steps, landscape.losses, ax),
    }
    if (plane := landscape.plane) is not None:
        figures["plane"] = lambda ax: plot.plane_plot(plane.steps, plane.steps, plane.losses, ax)
    if activations is not None:
        figures["activations"] = lambda ax: plot.layer_plot(activations.activations, ax)
    return figures


def _chart_data(result: dict[str, Any]) -> dict[str, Any]:
    """What page.js draws the interactive charts from."""
    landscape, points = result["landscape"], {name: result[name] for name in ("eigenvalues", "residuals")}
    spectrum = {"name": "", **result["density"], **points}
    lines = {name: landscape[name] for name in ("steps", "losses")}
    return short({"spectrum": [spectrum], "lines": lines, "surface": landscape["plane"]})


def _call(settings: dict[str, Any]) -> str:
    """The report's call in Python, where there was no command line."""
    options = {option.name for option in fields(Options)} - {"command"}
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if name in options)
    return f"hf.report(problem, out, {given})"


def _error(text: str) -> Any:
    """An estimate with its error in small letters."""
    from markupsafe import Markup, escape

    mean, _, error = text.partition(" +- ")
    return Markup(f"{escape(mean)} <small>&plusmn; {escape(error)}</small>")


def _breakable(name: str) -> Any:
    """A name that may be broken into lines after its dots and underscores."""
    from markupsafe import Markup, escape

    return escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _value(x: float) -> str:
    """The text that a column sorts by."""
    return "" if math.isnan(x) else repr(x)
