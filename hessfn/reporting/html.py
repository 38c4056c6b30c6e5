"""What a report looks like: the figures, the page, and how they get to their folder."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import Tensor

from hessfn.core.errors import InvalidInput, MissingExtra
from hessfn.plotting import plot
from hessfn.reporting.analysis import Analysis
from hessfn.reporting.text import estimate, number, setting, share

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes


# As in page.css.
_DARK = {
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
    environment.filters.update(number=number, setting=setting, error=_error, value=_value, dotted=_dotted)
    library = plotly.offline.get_plotlyjs
    environment.globals.update(estimate=estimate, share=share, plotly=lambda: _packed(library()))
    return environment.get_template(name)


def write(folder: Path, template: jinja2.Template, analysis: Analysis, result: dict[str, Any]) -> None:
    """``report.json``, the figures and ``report.html``, which needs none of the others."""
    images = {}
    for name, draw in _figures(analysis).items():
        height = plot.layer_plot_height(len(result[name])) if name in ("layers", "activations") else 3.8
        images[name] = picture(draw, height)
        (folder / f"{name}.png").write_bytes(base64.b64decode(images[name].light))
    top = int(analysis.eigen.values.abs().argmax())
    spectrum = {"name": "", **result["density"], **{key: result[key] for key in ("eigenvalues", "residuals")}}
    lines = {key: result["landscape"][key] for key in ("steps", "losses")}
    data = short({"spectrum": [spectrum], "lines": lines, "surface": result["landscape"]["plane"]})
    shown = template.render(**result, images=images, top_index=top, data=data, call=_call(result["settings"]))
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / "report.html").write_text(shown, "utf-8")


def picture(draw: Callable[[Axes], Any], height: float) -> Picture:
    def png(colors: dict[Any, Any]) -> str:
        with mpl.rc_context(colors):
            figure = Figure(figsize=(6.4, height), layout="constrained")  # no pyplot: no display, no global state
            draw(figure.subplots())
            file = io.BytesIO()
            figure.savefig(file, dpi=144)
        return base64.b64encode(file.getvalue()).decode()

    return Picture(png({}), png(_DARK))


def short(x: Any) -> Any:
    """What a picture can show of numbers: six digits."""
    if isinstance(x, dict):
        return {key: short(value) for key, value in x.items()}
    if isinstance(x, list):
        return [short(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def plain(x: Any) -> Any:
    """What JSON can say: tensors as numbers or lists, what is not finite as null."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A scratch folder inside ``out``. Its files move to ``out`` when all of them are there, or never."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    except OSError as error:
        raise InvalidInput(f"the report cannot be written to {str(out)!r}: {error.strerror}") from error
    try:
        yield scratch
        for file in sorted(scratch.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # those with a report in them are not empty
            for folder in made:
                folder.rmdir()


@functools.cache
def _packed(script: str) -> str:
    """All of the library is in the page, which works offline: 2 MB, where it would be 5 as it is."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _figures(analysis: Analysis) -> dict[str, Callable[[Axes], Any]]:
    plane, flows = analysis.plane, analysis.activations
    return {
        "density": lambda ax: plot.density_plot(analysis.density, ax, band=analysis.band),
        "eigenvalues": lambda ax: plot.eigen_plot(analysis.eigen, ax),
        "layers": lambda ax: plot.layer_plot(analysis.layers, ax),
        "landscape": lambda ax: plot.line_plot(analysis.steps, analysis.losses, ax),
        **({"plane": lambda ax: plot.plane_plot(plane.steps, plane.steps, plane.losses, ax)} if plane else {}),
        **({"activations": lambda ax: plot.layer_plot(flows.activations, ax)} if flows else {}),
    }


def _call(settings: dict[str, Any]) -> str:
    """The report's call in Python, where there was no command line."""
    described = ("problem", "parameters", "samples", "command")
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items() if name not in described)
    return f"hf.report(problem, out, {options})"


def _error(text: str) -> Any:
    from markupsafe import Markup, escape

    mean, _, error = text.partition(" +- ")
    return Markup(f"{escape(mean)} <small>&plusmn; {escape(error)}</small>")


def _dotted(name: str) -> Any:
    """A name that may be broken into lines at its dots."""
    from markupsafe import Markup, escape

    return escape(name).replace(".", Markup(".<wbr>"))


def _value(x: float) -> str:
    """What a column sorts by."""
    return "" if math.isnan(x) else repr(x)
