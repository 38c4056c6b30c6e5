"""Two reports side by side: where the curvature of two nets differs by more than the errors of its estimates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from hessfn.core.errors import InvalidInput
from hessfn.core.results import Density
from hessfn.plotting import plot
from hessfn.reporting import html, text
from hessfn.reporting.html import short
from hessfn.reporting.text import estimate, number

_SURE = 0.05  # the chance that a comparison, or a table of layers as a whole, marks what is equal


class Measured(NamedTuple):
    """A number and its error; NaN where there is none."""

    mean: float
    stderr: float


Layers = dict[str, tuple[int, Measured]]  # numel, trace


class Side(NamedTuple):
    """What a folder's ``report.json`` says, as far as two can be compared."""

    folder: str
    loss: float
    eigenvalues: list[Measured]
    trace: Measured
    negative: Measured
    layers: Layers
    activations: Layers
    density: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, Any]


class Difference(NamedTuple):
    """B's less A's, its standard error, that many of it (NaN where unknown), and whether that is beyond chance."""

    mean: float
    stderr: float
    units: float
    differs: bool


def compare(a: str | Path, b: str | Path, out: str | Path = "compare.html") -> dict[str, Any]:
    """Sets the reports of two folders side by side on one page, such as those of two checkpoints or two optimisers.

    Traces are compared in units of the combined standard error, ``(B - A) / sqrt(stderr_A^2 + stderr_B^2)``, against
    Student's t at 95 %; for the layers, at 95 % for all of them together (Bonferroni). Reports of the same seed share
    their probes, which makes the true error of the difference smaller as a rule: these are then on the safe side.
    Eigenvalues differ for sure where they are further apart than the sum of their residuals.

    Args:
        a: a folder that ``hessfn report`` has written, with ``report.json`` in it; ``b`` another one.
        out: the page to write; its folder is made if it is not there.

    Returns:
        ``loss`` (one each), ``eigenvalues`` (pairs, and whether they differ), ``trace`` and ``negative_curvature`` (a
        :class:`Difference`), ``layers`` and ``activations`` (name: the same, of those that both have), ``only``
        (layers that one has), ``critical`` (how many errors apart a layer must be, and an activation).

    Raises:
        ModuleNotFoundError: jinja2 or plotly, which make the page, is not installed.
        ValueError: a folder holds no ``report.json``, or another kind of one, or ``out`` cannot be written.
    """
    template = html.template("compare.html.j2")
    sides = read(a), read(b)
    result = difference(*sides)
    labelled = list(zip("AB", sides, strict=True))
    drawn = {name: Density(side.density["grid"], side.density["values"]) for name, side in labelled}
    images = {"density": html.picture(lambda ax: plot.density_plot(drawn, ax), 3.8)}
    spectrum = [{"name": name, **side.density, **_columns(side.eigenvalues)} for name, side in labelled]
    data = short(html.plain({"spectrum": spectrum}))
    shown = {"sides": sides, "result": result, "settings": _settings(*sides)}
    text = template.render(**shown, images=images, data=data)
    with html.staging(Path(out).parent) as folder:
        (folder / Path(out).name).write_text(text, "utf-8")
    return result


def read(folder: str | Path) -> Side:
    """``report.json`` of a folder, checked."""
    file = Path(folder) / "report.json"
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InvalidInput(
            f"there is no report in {str(folder)!r} ({error.strerror}: {file.name}); hessfn report PROBLEM --out "
            f"{str(folder)!r} makes one"
        ) from error
    except ValueError as error:
        raise InvalidInput(f"{str(file)!r} is not JSON: {error}") from error
    try:
        density = {key: _numbers(values) for key, values in found["density"].items() if values is not None}
        return Side(
            folder=str(folder),
            loss=_number(found["loss"]),
            eigenvalues=list(map(Measured, _numbers(found["eigenvalues"]), _numbers(found["residuals"]))),
            trace=_measured(found["trace"], "mean"),
            negative=_measured(found.get("negative_curvature", {}), "mean"),
            layers=_layers(found["layers"]),
            activations=_layers(found.get("activations") or {}),
            density={**density, "grid": density["grid"], "values": density["values"]},
            settings={**found["settings"], **{key: found["settings"][key] for key in ("which", "probes", "runs")}},
            versions=dict(found["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInput(f"{str(file)!r} is not a report of hessfn: {reason}") from error


def difference(a: Side, b: Side) -> dict[str, Any]:
    probes, runs, flows = (min(side.settings.get(x, 0) for side in (a, b)) for x in ("probes", "runs", "activations"))
    layers, activations = _by_layer(a.layers, b.layers, probes), _by_layer(a.activations, b.activations, flows)
    same_end = a.settings["which"] == b.settings["which"]
    return {
        "loss": (a.loss, b.loss),
        "eigenvalues": [
            (x, y, same_end and abs(x.mean - y.mean) > x.stderr + y.stderr)
            for x, y in zip(a.eigenvalues, b.eigenvalues, strict=False)
        ],
        "trace": _difference(a.trace, b.trace, _critical(probes)),
        "negative_curvature": _difference(a.negative, b.negative, _critical(runs)),
        "layers": layers,
        "activations": activations,
        "only": {"A": [x for x in a.layers if x not in layers], "B": [x for x in b.layers if x not in layers]},
        "critical": {"layers": _critical(probes, len(layers)), "activations": _critical(flows, len(activations))},
    }


def summary(a: Side, b: Side, result: dict[str, Any]) -> str:
    """The difference in at most 80 columns."""

    def row(name: str, x: str, y: str, last: str) -> str:
        return f"{name:<12}{x:<20}{y:<20}{last}".rstrip()

    def compared(name: str, x: Measured, y: Measured, by: Difference, show: Any = estimate) -> str:
        return row(name, show(*x), show(*y), units(by))

    lines = [f"A  {text.cut(a.folder, 77)}", f"B  {text.cut(b.folder, 77)}", "", row("", "A", "B", "B - A")]
    lines.append(row("loss", number(a.loss), number(b.loss), number(b.loss - a.loss)))
    lines.append(compared("trace", a.trace, b.trace, result["trace"]))
    lines.append(compared("negative", a.negative, b.negative, result["negative_curvature"], text.share))
    for index, (x, y, differs) in enumerate(result["eigenvalues"], 1):
        lines.append(row(f"value {index}", number(x.mean), number(y.mean), "differ" if differs else "may be equal"))
    for kind, of in (("layers", "trace"), ("activations", "the trace of what enters")):
        marked = [(name, by) for name, by in result[kind].items() if by.differs]
        if result[kind] or kind == "layers":
            lines += ["", f"{len(marked)} of {len(result[kind])} layers that both have differ in {of}"]
        for name, by in sorted(marked, key=lambda item: -abs(item[1].units))[:8]:
            lines.append(f"  {text.cut(name, 42):<44}{estimate(by.mean, by.stderr)}")
    for side, names in result["only"].items():
        lines += [f"{len(names)} layers only {side} has"] if names else []
    return "\n".join(lines)


def units(by: Difference) -> str:
    """How far apart, in words."""
    if math.isnan(by.units):
        return "unknown"
    return f"{by.units:+.1f} errors: {'differ' if by.differs else 'may be equal'}"


def _columns(eigenvalues: list[Measured]) -> dict[str, list[float]]:
    return {"eigenvalues": [x.mean for x in eigenvalues], "residuals": [x.stderr for x in eigenvalues]}


def _settings(a: Side, b: Side) -> list[tuple[str, ...]]:
    """Name and both values of every setting and version that one of them has."""
    pairs = (a.settings, b.settings), (a.versions, b.versions)
    return [
        (name, *(text.setting(side[name]) if name in side else "" for side in (x, y)))
        for x, y in pairs
        for name in dict.fromkeys([*x, *y])
    ]


def _critical(samples: int, comparisons: int = 1) -> float:
    """Beyond so many standard errors it is no chance; with the degrees of freedom of the smaller sample."""
    return float(stats.t.ppf(1 - _SURE / (2 * max(comparisons, 1)), samples - 1)) if samples > 1 else math.inf


def _by_layer(a: Layers, b: Layers, samples: int) -> dict[str, Difference]:
    both = [name for name in a if name in b]
    return {name: _difference(a[name][1], b[name][1], _critical(samples, len(both))) for name in both}


def _difference(a: Measured, b: Measured, critical: float) -> Difference:
    mean, stderr = b.mean - a.mean, math.hypot(a.stderr, b.stderr)
    if stderr > 0 and math.isfinite(stderr):
        return Difference(mean, stderr, mean / stderr, abs(mean) > critical * stderr)
    if stderr == 0 and math.isfinite(mean):
        return Difference(mean, stderr, math.copysign(math.inf, mean) if mean else 0.0, mean != 0)
    return Difference(mean, stderr, math.nan, False)


def _layers(found: Any) -> Layers:
    return {name: (int(layer["numel"]), _measured(layer, "trace")) for name, layer in dict(found).items()}


def _measured(x: Any, key: str) -> Measured:
    return Measured(_number(x.get(key)), _number(x.get("stderr")))


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)


def _numbers(x: Any) -> list[float]:
    return [_number(value) for value in x]
